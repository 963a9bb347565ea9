"""The one room that knows DeepSpeed: engine, optimiser, clipping, and where ZeRO keeps what."""
