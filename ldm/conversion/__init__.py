"""Checkpoints in the official layout (one file) and in that of diffusers (a folder), turned into each other.

`rows` renames tensors. `unet`, `first_stage` and `text` hold the tables of names, and a network's sizes in both forms.
`recipe` reads an official config, `layout` makes a folder of it, `folder` reads one, `job` is scripts/convert.py.
"""
