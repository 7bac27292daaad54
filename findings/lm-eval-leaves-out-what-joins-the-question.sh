#!/bin/bash
# lm-eval does not score the characters of an answer that a token has in common with the question, which without spaces is
# usual: in Chinese the answers of one question are scored over different parts of their texts.
#
# Version:      lm_eval 0.4.13, transformers 5.24.0, tokenizers 0.23.3, torch 2.13.0, CPython 3.11, CPU. Every model type that
#               uses TemplateLM._encode_pair, hf and vllm among them.
# Likely guess: log P(answer | question) is of the whole answer; if a token crosses the border, both are encoded apart, or it is
#               reported. (Spaces at the end of a question are moved to the answer for this reason.)
# Behaviour:    what is scored are the ids of question + answer behind as many ids as the question alone has. A token over
#               the border is one of the question's in that count: its part of the answer is given, not predicted. An
#               answer that lies in it whole ends the run with an AssertionError, the others say nothing.
# Matters:      cloze and continuation tasks (target_delimiter "") prefer answers whose beginning merges with the question; acc
#               depends on the tokenizer's merges more than on the model, and acc_norm divides by the whole length.
# Seen:         question 我住在中: of 国北方 is scored 北方, of 间 all; a model that gives every token the same probability: -5.6
#               for 国北方, and -11.2 where it is encoded apart
#
# Exits with 1 if this changes.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"${PYTHON:-python3.11}" -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install -q --disable-pip-version-check "lm_eval==0.4.13" "torch==2.13.0" "transformers==5.24.0" \
    "tokenizers==0.23.3" "accelerate==1.15.0" "numpy==1.26.4"
cd "$scratch"
"$scratch/venv/bin/python" - 2> /dev/null <<'PYTHON'
import math

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

bpe = Tokenizer(models.BPE())
bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
bpe.decoder = decoders.ByteLevel()
alphabet = pre_tokenizers.ByteLevel.alphabet()
bpe.train_from_iterator(
    ["我", "住", "在", "中", "国", "北方", "间", "中国"] * 9,
    trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["</s>"], show_progress=False),
)
tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>", pad_token="</s>")
config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
model = LlamaForCausalLM(config)
torch.nn.init.zeros_(model.lm_head.weight)  # every token has the same probability
harness = HFLM(pretrained=model, tokenizer=tokenizer, device="cpu")
question, holds = "我住在中", []
for answer, expected in (("国北方", "北方"), ("间", "间")):
    (score, _), = harness.loglikelihood([Instance("loglikelihood", {}, (question, answer), 0)], disable_tqdm=True)
    scored = tokenizer.decode(harness._encode_pair(question, answer)[1])
    apart = -len(tokenizer.encode(answer)) * math.log(len(tokenizer))
    print(f"{question} | {answer}: scored {scored}, log-likelihood {score:.1f}, of the answer encoded apart {apart:.1f}")
    holds += [scored == expected, (abs(score - apart) < 0.01) == (scored == answer)]
raise SystemExit(0 if all(holds) else 1)
PYTHON
