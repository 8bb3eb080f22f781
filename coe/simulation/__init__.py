"""Simulation of many experts on little memory: discrete events under a virtual clock.

The scheduler, the plans for room and the eviction policies are those of the Host; only weights, copies and answers are
replaced by the seconds that they take.
"""
