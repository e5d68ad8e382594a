"""Checkpoints in the official layout (one file) and in that of diffusers (a folder), turned into each other.

`rows` renames tensors, `unet`, `first_stage` and `text` hold the tables of names and the two forms of a network's sizes,
`recipe` reads an official config, `folder` a diffusers folder, and `job` does the work of scripts/convert.py.
"""
