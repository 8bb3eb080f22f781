"""Plug-ins of every sort for coe. They use only the public API of coe and routers."""
