"""Write a checkpoint as GGUF with llama.cpp's own converter: convert.py LLAMA_CPP FOLDER --outtype TYPE --outfile FILE.

Without a vocabulary: what is measured is token ids, and neither random checkpoints nor ones whose tokenizer llama.cpp
does not know can be converted with one.
"""

import sys

sys.path.insert(0, sys.argv.pop(1))

import convert_hf_to_gguf
from conversion.deepseek import DeepseekV2Model

DeepseekV2Model.set_vocab = DeepseekV2Model._set_vocab_none
convert_hf_to_gguf.main()
