"""Loads a GGUF file with llama.cpp, generates a token, and compares encodings with tiktoken's.

usage: llama.py LIBRARIES FILE.gguf TEXT...    (the environment variable O200K names o200k_base.tiktoken)

Where llama.cpp differs by its own design, nothing is compared: its pattern for o200k knows no combining marks, and it
takes Harmony's special tokens for such in any text.
"""

import os
import re
import sys

LIBRARIES, MODEL, *TEXTS = sys.argv[1:]
os.environ["LLAMA_CPP_LIB_PATH"] = LIBRARIES

import llama_cpp
import numpy
import tiktoken
import unicodedata
from tiktoken.load import load_tiktoken_bpe

HARMONY = {
    "<|startoftext|>": 199998, "<|endoftext|>": 199999, "<|return|>": 200002, "<|constrain|>": 200003,
    "<|channel|>": 200005, "<|start|>": 200006, "<|end|>": 200007, "<|message|>": 200008, "<|call|>": 200012,
}
PATTERN = "|".join([
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+",
])

reference = tiktoken.Encoding(
    "o200k_harmony", pat_str=PATTERN, mergeable_ranks=load_tiktoken_bpe(os.environ["O200K"]), special_tokens=HARMONY)
model = llama_cpp.Llama(model_path=MODEL, n_ctx=256, n_batch=64, n_threads=2, verbose=False, logits_all=True)
failures = 0


def check(ok, text):
    global failures
    failures += not ok
    print(("  ok    " if ok else "  FAIL  ") + text)


check((model.token_bos(), model.token_eos(), model.n_vocab()) == (199998, 200002, 200014), "bos, eos, tokens")
conversation = "<|start|>user<|message|>Hi<|end|><|start|>assistant"
found = model.tokenize(conversation.encode(), add_bos=False, special=True)
check(found == reference.encode(conversation, allowed_special="all"), "Harmony's special tokens")
check(model.tokenize(b"Hi", special=False) == reference.encode_ordinary("Hi"), "no token is put in front")

tokens = 0
for path in TEXTS:
    text = "".join(char for char in open(path, encoding="utf-8").read() if not unicodedata.category(char).startswith("M"))
    text = re.sub(r"<\|", "< |", text)
    needed = reference.encode_ordinary(text)
    tokens += len(needed)
    check(model.tokenize(text.encode(), add_bos=False, special=False) == needed, f"encoding of {path}")
print(f"  {tokens} tokens compared")

prompt = reference.encode_ordinary("The quick brown fox jumps over the lazy dog")
model.eval(prompt)
logits = numpy.array(model.scores[:len(prompt)])
check(numpy.isfinite(logits).all() and logits.std() > 0, f"logits; the next token is {int(logits[-1].argmax())}")
sys.exit(1 if failures else 0)
