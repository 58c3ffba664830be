"""Fused computation: each Triton kernel beside its plain-torch reference, and the layers and patches that use them."""
