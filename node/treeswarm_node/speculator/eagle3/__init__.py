"""Published EAGLE-3 heads, in the flat format of EAGLE and SpecForge and the nested one of vLLM's speculators."""
