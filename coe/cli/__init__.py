"""The `coe` command, one module a group. Commands import what they need when they run: `coe --help` stays instant."""
