"""Read a checkpoint's tokenizer without transformers, as the text of the tokenizers library that transformers builds.

The special tokens of several files are joined as transformers 4.57 joins them: tokenization_utils_base.py
(_from_pretrained), tokenization_utils_fast.py (PreTrainedTokenizerFast.__init__), BertTokenizerFast, BertConverter,
GPT2Tokenizer, RobertaTokenizer, their fast versions and converters.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, WordPiece

from engine.checkpoints.files import read_json, refuse_stand_in
from engine.errors import CheckpointError

FILE, VOCABULARY, BYTE_PAIRS, MERGES = "tokenizer.json", "vocab.txt", "vocab.json", "merges.txt"
"""A tokenizer needs one of the first three files; the third comes with the last."""
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
ADDITIONAL = "additional_special_tokens"
BERT = {
    "do_lower_case": True,
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
    "tokenize_chinese_chars": True,
    "strip_accents": None,
}
"""Settings of BertTokenizerFast with their defaults."""
GPT2 = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
ROBERTA = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "sep_token": "</s>",
    "cls_token": "<s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "mask_token": "<mask>",
}
BART_CLASSES = ("BartTokenizer", "BartTokenizerFast")
BYTE_PAIR_CLASSES = {
    "GPT2Tokenizer": GPT2,
    "GPT2TokenizerFast": GPT2,
    "RobertaTokenizer": ROBERTA,
    "RobertaTokenizerFast": ROBERTA,
    **dict.fromkeys(BART_CLASSES, ROBERTA),
}
"""Classes of byte-level BPE, with the defaults of their special tokens."""
WORD_PIECE_CLASSES = ("BertTokenizer", "BertTokenizerFast")
PLAIN_CLASSES = ("PreTrainedTokenizerFast",)
LATER_CLASSES = ("TokenizersBackend", "PreTrainedTokenizer")
"""Classes of transformers 5, whose settings transformers 4 cannot read: tokenizer.json and special tokens count."""


class TokenizerText(NamedTuple):
    """A tokenizer as JSON of the tokenizers library, and whether spaces before punctuation are removed from text."""

    text: str
    clean_up_tokenization_spaces: bool


def has_tokenizer(directory: Path) -> bool:
    """Return whether a checkpoint has a file that a tokenizer can be read from."""
    return any((directory / name).is_file() for name in (FILE, VOCABULARY, BYTE_PAIRS))


def missing_tokenizer(directory: Path) -> CheckpointError:
    """Return the error for a checkpoint without a tokenizer. Trainer saves one only if it gets the processor."""
    config = directory / "config.json"
    base = (read_json(config).get("_name_or_path") if config.is_file() else None) or "BASE"
    return CheckpointError(
        f"{directory} has no tokenizer (tokenizer.json, vocab.txt or vocab.json): copy it and preprocessor_config.json "
        f"from the checkpoint that the training started from, as in AutoProcessor.from_pretrained({str(base)!r})"
        f".save_pretrained({str(directory)!r})"
    )


def refuse_unusable(directory: Path, ids: Mapping[str, int], special: Iterable[int], vocab_size: int | None) -> None:
    """Raise CheckpointError if a tokenizer has ids without an embedding in the model, or special tokens alone.

    `ids` are those of all tokens, `special` the ids of special ones. The model has `vocab_size` token embeddings.
    """
    entries = 1 + max(ids.values(), default=-1)
    if vocab_size is not None and entries > vocab_size:
        raise CheckpointError(
            f"{directory}: the tokenizer has {entries} entries, but the model has {vocab_size} token embeddings: call "
            "model.resize_token_embeddings(len(tokenizer)), train the new embeddings and save the model again"
        )
    if set(ids.values()) <= set(special):
        raise CheckpointError(
            f"{directory}: every token of the tokenizer is special, so all captions would be empty: mark only "
            "tokens such as [DEC] as special"
        )


def refuse_code(directory: Path) -> None:
    """Raise CheckpointError if a settings file of the tokenizer is not a file of that kind, or asks for custom code."""
    for name in (FILE, VOCABULARY, BYTE_PAIRS, MERGES, *SETTINGS):
        if (directory / name).is_file():
            refuse_stand_in(directory / name)
    path = directory / SETTINGS[0]
    if path.is_file() and "auto_map" in read_json(path):
        raise CheckpointError(f"{path} asks for custom code (auto_map), which is never run: remove that entry")


def special_settings(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of tokenizer_config.json that both releases of transformers write alike.

    They are the special tokens, as text, and those in OTHERS.
    """
    settings: dict[str, Any] = {name: _text(raw[name]) for name in SPECIAL if raw.get(name)}
    extra = raw.get("extra_special_tokens") or raw.get(ADDITIONAL) or []
    if isinstance(extra, list):
        settings[ADDITIONAL] = [_text(token) for token in extra]
    return settings | {name: raw[name] for name in OTHERS if name in raw}


OTHERS = ("do_lower_case", "strip_accents", "clean_up_tokenization_spaces", "model_max_length")


def _text(token: Any) -> str:
    """Return the text of a token, which is stored as a string or as an object with its content."""
    return str(token.get("content")) if isinstance(token, dict) else str(token)


def read_tokenizer(directory: Path, default_class: str, vocab_size: int, special: Sequence[str] = ()) -> TokenizerText:
    """Return the tokenizer of a checkpoint as transformers 4.57 loads it, without padding and truncation.

    `default_class` is the class of a checkpoint that names none. `special` are special tokens to add if the tokenizer
    has none of them, see Rules.special_tokens. Raises CheckpointError if there is no usable
    tokenizer, if its class is not known here, or if it has ids without an embedding in the model.
    """
    file = directory / FILE
    if not has_tokenizer(directory):
        raise missing_tokenizer(directory)
    refuse_code(directory)
    raw = _optional(directory / SETTINGS[0])
    kind = raw.get("tokenizer_class") or _optional(directory / "config.json").get("tokenizer_class") or default_class
    if kind not in (*WORD_PIECE_CLASSES, *BYTE_PAIR_CLASSES, *PLAIN_CLASSES, *LATER_CLASSES):
        raise CheckpointError(
            f"{directory} has a {str(kind)[:60]}, which is not read without transformers: export the checkpoint with "
            "`python -m export` (in the repository)"
        )
    try:
        tokenizer, clean_up = _built(directory, raw, kind)
        if not any(tokenizer.token_to_id(text) is not None for text in special):
            tokenizer.add_special_tokens(list(special))
        refuse_unusable(
            directory,
            tokenizer.get_vocab(with_added_tokens=True),
            [id_ for id_, token in tokenizer.get_added_tokens_decoder().items() if token.special],
            vocab_size,
        )
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return TokenizerText(tokenizer.to_str(pretty=True), clean_up)
    except CheckpointError:
        raise
    except Exception as error:  # the tokenizers library raises plain exceptions
        reason = " ".join(str(error).split())[:200]
        if file.is_file():
            raise CheckpointError(f"{file} cannot be read: {reason}") from error
        raise CheckpointError(f"{directory} has no usable tokenizer ({reason}): add tokenizer.json") from error


def _built(directory: Path, raw: Mapping[str, Any], kind: str) -> tuple[Tokenizer, bool]:
    """Return the tokenizer of a class, and whether spaces are cleaned up.

    What transformers 4 cannot read comes from tokenizer.json alone, if it is there, as in the export.
    """
    file = directory / FILE
    if kind not in LATER_CLASSES:
        try:
            return _joined(directory, raw, kind)
        except Exception:
            if not file.is_file():
                raise
    settings = special_settings(raw)
    tokenizer = Tokenizer.from_file(str(file))
    _add_tokens(tokenizer, settings, {})
    _apply_prefix_space(tokenizer, {}, is_roberta=False)
    return tokenizer, bool(settings.get("clean_up_tokenization_spaces", False))


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _joined(directory: Path, raw: Mapping[str, Any], kind: str) -> tuple[Tokenizer, bool]:
    """Return the tokenizer with the special tokens of all files, and whether spaces are cleaned up."""
    file, is_word_piece = directory / FILE, kind in WORD_PIECE_CLASSES
    settings = {name: _added_tokens(value) for name, value in raw.items()}
    decoder = _decoder(directory, settings)
    by_text = {str(token): token for token in decoder.values()}
    if is_word_piece:
        settings = BERT | settings
    for name in SPECIAL:
        if settings.get(name) is not None:
            settings[name] = by_text.get(str(settings[name]), settings[name])
    if kind in BYTE_PAIR_CLASSES:
        settings = _byte_pair_settings(settings, kind, is_slow=not file.is_file())
    clean_up = settings.get("clean_up_tokenization_spaces", not file.is_file())
    if file.is_file():
        tokenizer = Tokenizer.from_file(str(file))
        if tokenizer.padding:
            settings.setdefault("pad_token", tokenizer.padding["pad_token"])
    elif is_word_piece:
        tokenizer = _word_pieces(directory / VOCABULARY, settings)
    elif kind in BYTE_PAIR_CLASSES:
        tokenizer = _byte_pairs(directory, settings)
    else:
        raise ValueError("only tokenizer.json is read for its class")
    _add_tokens(tokenizer, settings, decoder)
    if is_word_piece:
        _apply_bert(tokenizer, settings)
    is_roberta = BYTE_PAIR_CLASSES.get(kind) is ROBERTA
    if kind in BYTE_PAIR_CLASSES and not file.is_file():  # now all special tokens have ids
        tokenizer.post_processor = _byte_pair_processor(tokenizer, settings, is_roberta=is_roberta)
    _apply_prefix_space(tokenizer, settings, is_roberta=is_roberta)
    return tokenizer, bool(clean_up)


def _decoder(directory: Path, settings: dict[str, Any]) -> dict[int, AddedToken]:
    """Return the added tokens that the files list, by id, and put the special tokens of older files in `settings`."""
    if "added_tokens_decoder" in settings:
        return {int(id_): _token(token) for id_, token in settings.pop("added_tokens_decoder").items()}
    for name, value in _optional(directory / SETTINGS[1]).items():
        if isinstance(value, dict):
            value = AddedToken(**(value | {"special": True}))
        elif name == ADDITIONAL and isinstance(value, list):
            joined = list(settings.get(ADDITIONAL) or [])
            for token in value:
                added = AddedToken(**(token | {"special": True})) if isinstance(token, dict) else token
                if not any(type(added) is type(other) and added == other for other in joined):
                    joined.append(added)
            value = joined
        settings[name] = value
    special = {str(settings[name]) for name in SPECIAL if settings.get(name) is not None}
    special |= {str(token) for token in settings.get(ADDITIONAL) or []}
    decoder = {
        int(id_): AddedToken(text, normalized=text not in special, special=text in special)
        for text, id_ in _optional(directory / SETTINGS[2]).items()
    }
    if (directory / FILE).is_file():
        for token in read_json(directory / FILE)["added_tokens"]:
            decoder[token["id"]] = AddedToken(**{name: value for name, value in token.items() if name != "id"})
    return decoder


def _token(token: Any) -> AddedToken:
    return token if isinstance(token, AddedToken) else AddedToken(**token)


def _added_tokens(value: Any) -> Any:
    """Return a setting with its serialised tokens (`__type` is AddedToken) as objects."""
    if isinstance(value, dict):
        if value.get("__type") == "AddedToken":
            return AddedToken(**{name: part for name, part in value.items() if name != "__type"})
        return {name: _added_tokens(part) for name, part in value.items()}
    return [_added_tokens(part) for part in value] if isinstance(value, list) else value


def _add_tokens(tokenizer: Tokenizer, settings: Mapping[str, Any], decoder: Mapping[int, AddedToken]) -> None:
    """Add the tokens of `decoder`, and then special tokens, that the tokenizer does not have yet."""
    known = {repr(token) for token in tokenizer.get_added_tokens_decoder().values()}
    tokens: list[str | AddedToken] = [token for _, token in sorted(decoder.items()) if repr(token) not in known]
    texts = {token.content for token in tokenizer.get_added_tokens_decoder().values()} | {str(t) for t in tokens}
    special: dict[str, str | AddedToken] = {}
    more = settings.get("extra_special_tokens") or {}
    for token in (
        *(settings.get(name) for name in SPECIAL),
        *(settings.get(ADDITIONAL) or ()),
        *more.values(),
    ):
        if token is not None and not isinstance(token, str | AddedToken):
            raise TypeError(f"a special token of type {type(token).__name__}")
        if token:
            special.setdefault(str(token), token)
    # objects are added again although the tokenizer has their text: their properties may differ
    tokens += [token for token in special.values() if isinstance(token, AddedToken) or token not in texts]
    added = []
    for token in tokens:
        is_special = str(token) in special or (isinstance(token, AddedToken) and token.special)
        if isinstance(token, str):
            token = AddedToken(token, special=is_special)
        token.special = is_special
        added.append(token)
    if added:
        tokenizer.add_tokens(added)


def _word_pieces(vocabulary: Path, settings: Mapping[str, Any]) -> Tokenizer:
    """Return BERT's tokenizer of a vocab.txt with one word piece per line."""
    with vocabulary.open(encoding="utf-8") as stream:
        ids = {line.rstrip("\n"): number for number, line in enumerate(stream)}
    tokenizer = Tokenizer(WordPiece(ids, unk_token=str(settings["unk_token"])))
    is_basic = settings.get("do_basic_tokenize", True)
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=bool(is_basic and settings["tokenize_chinese_chars"]),
        strip_accents=settings["strip_accents"] if is_basic else False,
        lowercase=bool(is_basic and settings["do_lower_case"]),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    start, end = str(settings["cls_token"]), str(settings["sep_token"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start}:0 $A:0 {end}:0",
        pair=f"{start}:0 $A:0 {end}:0 $B:1 {end}:1",
        special_tokens=[(start, ids[start]), (end, ids[end])],
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return tokenizer


def _apply_bert(tokenizer: Tokenizer, settings: Mapping[str, Any]) -> None:
    """Set lower case, accents and Chinese characters of the normalizer as the settings say, if they differ."""
    wanted = {
        "lowercase": settings["do_lower_case"],
        "strip_accents": settings["strip_accents"],
        "handle_chinese_chars": settings["tokenize_chinese_chars"],
    }
    state = json.loads(tokenizer.normalizer.__getstate__())
    if any(state.get(name, value) != value for name, value in wanted.items()):
        kind = getattr(normalizers, state.pop("type"))
        tokenizer.normalizer = kind(**(state | wanted))


def _byte_pair_settings(settings: Mapping[str, Any], kind: str, *, is_slow: bool) -> dict[str, Any]:
    """Return the settings of a byte-level BPE tokenizer with the defaults of its class.

    Without tokenizer.json transformers makes the slow tokenizer first (`is_slow`), which turns texts into objects whose
    `normalized` stays true although they are special.
    """
    settings = {**BYTE_PAIR_CLASSES[kind], **settings}
    mask = settings.get("mask_token")
    if BYTE_PAIR_CLASSES[kind] is ROBERTA and isinstance(mask, str):
        settings["mask_token"] = AddedToken(mask, lstrip=True, rstrip=False, normalized=kind in BART_CLASSES)
    if is_slow:
        for name in set(SPECIAL) - {"mask_token"}:
            if isinstance(settings.get(name), str):
                settings[name] = AddedToken(settings[name], lstrip=False, rstrip=False, normalized=True)
    return settings


def _byte_pairs(directory: Path, settings: Mapping[str, Any]) -> Tokenizer:
    """Return the byte-level BPE tokenizer of vocab.json and merges.txt, whose first line is a comment."""
    with (directory / BYTE_PAIRS).open(encoding="utf-8") as stream:
        ids = json.load(stream)
    lines = (directory / MERGES).read_text(encoding="utf-8").split("\n")[1:-1]
    merges = list(dict.fromkeys(tuple(line.split()) for line in lines))
    tokenizer = Tokenizer(
        BPE(vocab=ids, merges=merges, continuing_subword_prefix="", end_of_word_suffix="", fuse_unk=False)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=settings.get("add_prefix_space", False))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _byte_pair_processor(tokenizer: Tokenizer, settings: Mapping[str, Any], *, is_roberta: bool) -> Any:
    """Return the post-processor that transformers gives a tokenizer made from vocab.json and merges.txt."""
    bos, sep, cls = (str(settings.get(f"{name}_token")) for name in ("bos", "sep", "cls"))
    if is_roberta:
        return processors.RobertaProcessing(
            sep=(sep, tokenizer.token_to_id(sep)),
            cls=(cls, tokenizer.token_to_id(cls)),
            add_prefix_space=settings.get("add_prefix_space", False),
            trim_offsets=True,
        )
    if settings.get("add_bos_token", False):
        return processors.TemplateProcessing(
            single=f"{bos}:0 $A:0",
            pair=f"{bos}:0 $A:0 $B:1",
            special_tokens=[(bos, tokenizer.token_to_id(bos))],
        )
    return processors.ByteLevel(trim_offsets=False)


def _apply_prefix_space(tokenizer: Tokenizer, settings: Mapping[str, Any], *, is_roberta: bool) -> None:
    """Set whether texts get a space in front as the settings say, if tokenizer.json says otherwise."""
    wanted = {"add_prefix_space": settings.get("add_prefix_space", False)}
    if is_roberta and tokenizer.post_processor is not None:
        _change(tokenizer, "post_processor", processors, wanted | {"trim_offsets": settings.get("trim_offsets", True)})
    with suppress(Exception):  # as transformers does for pre-tokenizers without such a state, and without any
        _change(tokenizer, "pre_tokenizer", pre_tokenizers, wanted)


def _change(tokenizer: Tokenizer, part: str, kinds: Any, wanted: Mapping[str, Any]) -> None:
    """Replace a part of a tokenizer if one of the settings that it has differs from `wanted`."""
    state = json.loads(getattr(tokenizer, part).__getstate__())
    changed = {name: value for name, value in wanted.items() if state.get(name, value) != value}
    if changed:
        kind = getattr(kinds, state.pop("type"))
        state = {name: tuple(value) if name in ("sep", "cls") else value for name, value in state.items()}
        setattr(tokenizer, part, kind(**(state | changed)))
