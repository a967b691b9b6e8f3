"""Hydra configuration of the command line; installed as ``lightning_qbn.configs``."""
