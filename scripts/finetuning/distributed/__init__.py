"""Strategies of several processes: DeepSpeed ZeRO, FSDP2, sharding of frozen layers, full weights, barriers."""
