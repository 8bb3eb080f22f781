"""`coe batch`: many requests from a file, answered stage by stage, each expert loaded once a stage.

    input ──scan──▶ splits ──route──▶ rows, calls ──answer──▶ answers ──step──▶ calls of the next stage ... ──▶ results

Everything between is a part file in the output folder, written whole or not at all: a part that exists is done, which
is all that resuming needs to know. Only `runner` touches Ray Data; everything else can be read and tested without it.
"""
