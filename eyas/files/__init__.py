"""Files of anybody's making: weights, configs, tokenizers, GGUF, drafts, chat data; read strictly, written whole or not at all."""
