"""Training of compositions: `coe latent train`.

To add a preset: one file with a `Trainer` (`trainer.py`), one line in `coe.latent.config.TRAINERS`, one YAML, one test.
"""
