"""`coe batch`: a file of requests, answered stage by stage; each expert is loaded once a stage.

    scan (source)  ->  route (parts)  ->  answer (answering)  ->  step (parts)  ->  answer  ->  ...  ->  merge (results)

Definitions:

- part: some thousand rows of the input, which are routed, planned and stepped together.
- stage: one step of every row's composition. A vote has one, an aggregation two, a chain one per expert.
- unit: the calls of one part to one expert in a stage. Its answers are one file.
- residency: what must be in memory to call an expert: its own weights, or those of an adapter's base.
- work item: units of one residency that one host answers in one go, the base's first, then those of its adapters.

The order of a run:

1. The input is cut into parts. Each part is routed, and its first stage is planned as units. With a budget, the first
   stage is planned when all parts are routed: the experts of all rows are chosen together (`joint`).
2. The units of a stage become work items. With one host each residency is one work item, so it is loaded once a stage;
   with several hosts large ones are split.
3. A free host claims the next work item and reserves one more, which it loads while it answers.
4. When all units of a stage are answered, every part is stepped: the next calls, or the results of the part.
5. Results are merged from sorted parts. They do not depend on when, where or in how many pieces a row was answered.

Each intermediate result is a part file in the run folder, written whole or not at all. A file that exists is done, so
`--resume` needs no other state.

Only `runner` imports Ray Data. Everything else runs, and is tested, in one process.
"""
