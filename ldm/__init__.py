"""Image models from AlexNet to Stable Diffusion: nets, numerics, recipes, data."""
