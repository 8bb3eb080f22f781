"""Resident weights under a byte budget: leases that are never broken, pins, slots; plans are pure functions."""

from coe.memory.cache import CacheStats, ExpertCache, SlotOf
from coe.memory.eviction import EvictionPolicy, Resident, lru
from coe.memory.room import Need

__all__ = ["CacheStats", "EvictionPolicy", "ExpertCache", "Need", "Resident", "SlotOf", "lru"]
