"""Quantisers that anyfit is compared with, each run on the same network and the same calibration tokens.

`llamacpp`, `autoround`, `gptqmodel`, `llmcompressor` and `hqq` are programs: each runs in a process of its own, all
but the first in an environment of its own, and imports nothing of anyfit. `runs` starts them and measures what they leave.
"""
