"""Models that SGLang loads in place of its own of the same name, where SGLANG_EXTERNAL_MODEL_PACKAGE=recorder."""
