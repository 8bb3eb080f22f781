"""`coe batch`: a file of requests, answered stage by stage; each expert is loaded once a stage.

    scan (source)  ->  route (parts)  ->  answer (answering)  ->  step (parts)  ->  answer  ->  ...  ->  merge (results)

1. The input is cut into parts of some thousand rows. A part is routed, planned and stepped as a whole.
2. A stage is one step of every row's composition: a vote has one, an aggregation two, a chain one an expert.
3. A unit is the calls of one part to one expert in a stage. Its answers are one file.
4. A residency is what must be in memory to call an expert: its own weights, or those of an adapter's base.
5. A work item is the units of one residency, answered by one host in one go, bases first, then adapters.
6. With one host each residency is one work item, so it is loaded once a stage; with several, large ones are split.
7. A free host claims the next work item and reserves one more, which it loads while it answers.
8. When all units of a stage are answered, every part is stepped: the next calls, or the results of the part.
9. Everything in between is a part file in the run folder, written whole or not at all. A file that exists is done, so
   `--resume` needs to know nothing else.
10. Results are merged from sorted parts. They do not depend on when, where or in how many pieces a row was answered.

Only `runner` imports Ray Data. Everything else runs, and is tested, in one process.
"""
