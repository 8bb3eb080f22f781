"""Resident weights under a byte budget: leases that are never broken, pins, and eviction policies as pure functions."""

from coe.memory.cache import CacheStats, ExpertCache
from coe.memory.eviction import EvictionPolicy, Resident, lru

__all__ = ["CacheStats", "EvictionPolicy", "ExpertCache", "Resident", "lru"]
