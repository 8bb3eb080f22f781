"""Resident weights under a byte budget: leases that are never broken, pins, slots; plans are pure functions."""

from coe.memory.cache import ExpertCache
from coe.memory.demand import Demand, RecentMix
from coe.memory.eviction import POLICIES, EvictionPolicy, Resident, gdsf, look_ahead, lru
from coe.memory.in_memory import InMemory
from coe.memory.loading import CacheStats
from coe.memory.places import SlotOf
from coe.memory.room import Need

__all__ = [
    "POLICIES",
    "CacheStats",
    "Demand",
    "EvictionPolicy",
    "ExpertCache",
    "InMemory",
    "Need",
    "RecentMix",
    "Resident",
    "SlotOf",
    "gdsf",
    "look_ahead",
    "lru",
]
