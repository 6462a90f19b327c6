"""Leaves out what huggingface_hub can work with, but does not need for what is used of it here.

An app that imports one of these itself still carries it. Without this, an environment with torch
makes a bundle of gigabytes.
"""

excludedimports = [
    "IPython",
    "PIL",
    "duckdb",
    "fastai",
    "fastapi",
    "gradio",
    "mcp",
    "pydantic",
    "safetensors.torch",
    "tensorboardX",
    "torch",
    "torch_xla",
]
