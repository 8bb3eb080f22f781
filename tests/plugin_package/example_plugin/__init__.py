"""Plug-ins of every sort for coe. They use nothing but the public interface of coe and routers."""
