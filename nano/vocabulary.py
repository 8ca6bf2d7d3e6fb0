"""The tokenizers of the nano family, learned from captions: byte-level BPE for CLIP, unigram for T5.

    vocabulary.make(out, captions, 32)           # out/tokenizer/, out/tokenizer_2/, as FLUX.1 has them

It needs only the tokenizers library.
"""
import json
import math
from collections import Counter

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers


def make(out, captions, text_tokens):
    """Write `tokenizer/` (CLIP: vocab.json, merges.txt) and `tokenizer_2/` (T5: tokenizer.json) as FLUX.1 has them."""
    clip(out / "tokenizer", captions)
    t5(out / "tokenizer_2", captions, text_tokens)


def clip(folder, captions):
    folder.mkdir(parents=True, exist_ok=True)
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.train_from_iterator(captions, trainers.BpeTrainer(
        vocab_size=4096, min_frequency=50, initial_alphabet=bytes_, end_of_word_suffix="</w>", show_progress=False))
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    # CLIP's order: bytes, bytes that end a word, merges, then the two special tokens; the last has the highest id.
    words = dict.fromkeys([*bytes_, *(b + "</w>" for b in bytes_), *("".join(pair) for pair in merges),
                           "<|startoftext|>", "<|endoftext|>"])
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    special = {"bos_token": "<|startoftext|>", **{f"{name}_token": "<|endoftext|>" for name in ("eos", "unk", "pad")}}
    write_json(folder / "tokenizer_config.json",
               {**special, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer", "do_lower_case": True})
    write_json(folder / "special_tokens_map.json", special)


def t5(folder, captions, text_tokens):
    folder.mkdir(parents=True, exist_ok=True)
    extra = [f"<extra_id_{i}>" for i in range(100)]
    split = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    # Unigram pieces: each word of the captions by its log frequency, and characters, so rare that no word is split.
    words = Counter(word for caption in captions for word in caption.replace(",", " ,").replace(":", " :").split())
    total = sum(words.values())
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [("▁" + word if word.isalnum() else word, math.log(n / total)) for word, n in words.most_common()]
    known = {piece for piece, _ in pieces}
    pieces += [(c, -20.0) for c in ["▁", *map(chr, range(33, 127))] if c not in known]
    pieces += [(name, 0.0) for name in reversed(extra)]          # T5 puts its sentinels last, backwards
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False)
                                  for name in ["<pad>", "</s>", "<unk>", *extra]])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    write_json(folder / "tokenizer_config.json", {
        **special, "model_max_length": text_tokens, "extra_ids": 100, "tokenizer_class": "T5Tokenizer"})
    write_json(folder / "special_tokens_map.json", special)


def write_json(file, value):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, indent=2) + "\n")
