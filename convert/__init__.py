"""Source checkpoints to MLX quantised arrays, imported as `mlx_gptoss.convert`."""
