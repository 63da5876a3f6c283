"""The door: commands, configs and messages. The only wing that knows Hydra, and that nothing imports."""
