"""A loaded model as a model of lm-eval, EleutherAI's evaluation harness (extra `eval`)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models import utils as harness
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from minillm_jax.data.prompts import Pieces, stop_tokens
from minillm_jax.data.text import tokenizer_of
from minillm_jax.evaluation.continuations import Likelihood, Request, likelihoods
from minillm_jax.evaluation.generate import GREEDY, Sampling, steps
from minillm_jax.model.decoder import learned_positions
from minillm_jax.model.loaded import Model

# Prompts that are continued at the same time.
PROMPTS = 16

Told = Callable[[int, int], None]


class Harness(TemplateLM):
    """The requests of lm-eval, answered by a decoder.

    Prompts are tokenised, cut on their left and scored as lm-eval's own model class of transformers does it.

    Args:
      model: any model with a tokenizer.
      tokens_per_batch: tokens of a batch on each device; by default what suits the platform.
      told: called with the number of requests done, and of all.

    Raises:
      InputError: the model has no tokenizer.
    """

    def __init__(self, model: Model, tokens_per_batch: int | None = None, told: Told | None = None) -> None:
        super().__init__()
        self._model, self._tokens_per_batch, self._told = model, tokens_per_batch, told
        self._loaded = tokenizer_of(model.folder)()
        self.tokenizer: Any = self._loaded.call

    @property
    def tokenizer_name(self) -> str:
        """The name of the tokenizer, by which lm-eval stores rendered prompts."""
        return self._model.name.replace("/", "__")

    @property
    def eot_token_id(self) -> int:
        """The end-of-sequence token."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without a context."""
        return self.eot_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence; lm-eval's default where configuration and tokenizer name none."""
        named = harness.resolve_max_length(SimpleNamespace(**self._model.text_values), self.tokenizer)  # pyright: ignore
        learned = learned_positions(self._model.decoder)
        return named if learned is None else min(named, learned)

    @property
    def max_gen_toks(self) -> int:
        """Tokens of a generated text, where a task names no number."""
        return 256

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; with the special tokens of the tokenizer where nothing is said and the text has none yet."""
        has_one = harness.has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id))
        if add_special_tokens is None and not has_one:
            return self.tokenizer.encode(string)
        return self.tokenizer.encode(string, add_special_tokens=bool(add_special_tokens))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation by the tokenizer's template."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """The log-likelihood of every continuation in nats, and whether it is the most probable text."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        found = self._scored([(context, continuation) for _, context, continuation in requests])
        for (texts, _, _), answer in zip(requests, found, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, tuple(answer))
        return [(answer.log, answer.greedy) for answer in found]

    def _scored(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Likelihood]:
        """Log-likelihoods of pairs of contexts and continuations, which are cut on their left."""
        return likelihoods(
            self._model.decoder,
            [fitting(context, continuation, self.max_length) for context, continuation in pairs],
            self._tokens_per_batch,
            self._told,
        )

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """The log-likelihood of whole texts, nats, in windows of the longest sequence."""
        windows = [list(self._windows(request.args[0])) for request in requests]
        found = iter(self._scored([window for of_text in windows for window in of_text]))
        totals = [sum(next(found).log for _ in of_text) for of_text in windows]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _windows(self, text: str) -> Iterator[tuple[list[int], list[int]]]:
        rolling = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return map(make_disjoint_window, rolling)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """The text behind every prompt, up to the strings that end it."""
        asked: list[tuple[str, dict[str, Any]]] = [cast(Any, request.args) for request in requests]
        by_settings: dict[str, list[int]] = {}
        for number, (_, settings) in enumerate(asked):
            by_settings.setdefault(repr(settings), []).append(number)
        found, done = [""] * len(requests), 0
        for numbers in by_settings.values():
            settings = asked[numbers[0]][1]
            by_length = sorted(numbers, key=lambda number: -len(asked[number][0]))
            for start in range(0, len(by_length), PROMPTS):
                part = by_length[start : start + PROMPTS]
                texts = self._continued([asked[number][0] for number in part], settings)
                for number, text in zip(part, texts, strict=True):
                    found[number] = text
                    self.cache_hook.add_partial("generate_until", asked[number], text)
                done += len(part)
                if self._told is not None:
                    self._told(done, len(requests))
        return found

    def _continued(self, prompts: Sequence[str], settings: Mapping[str, Any]) -> list[str]:
        """The texts behind some prompts, with the same settings."""
        chosen: dict[str, Any] = dict(harness.normalize_gen_kwargs(dict(settings), self.max_gen_toks))
        eos = self.tokenizer.decode(self.eot_token_id)
        ends = [end for end in harness.handle_stop_sequences(chosen["until"], eos) if end]
        count = chosen["max_gen_toks"]
        ids = [self.tok_encode(prompt)[-max(1, self.max_length - count) :] for prompt in prompts]
        pieces, texts = [Pieces(self._loaded, prompt) for prompt in ids], [""] * len(ids)
        stops = stop_tokens(self._model.folder, self._model.text_values, self._loaded)
        for tokens in steps(self._model.decoder, ids, count, sampling_of(chosen), stops):
            for row, token in enumerate(tokens):
                if token is not None:
                    texts[row] += pieces[row].add(token)
            if all(token is None or ended(text, ends) for token, text in zip(tokens, texts, strict=True)):
                break
        return [harness.postprocess_generated_text(piece.whole(), ends, None) for piece in pieces]


def ended(text: str, ends: Sequence[str]) -> bool:
    """Whether one of the strings that end a text stands in it."""
    return any(end in text for end in ends)


def fitting(context: Sequence[int], continuation: Sequence[int], longest: int) -> Request:
    """A request whose tokens, but for the last, fit into a sequence; its context is cut on the left."""
    whole = [*context, *continuation][-(longest + 1) :]
    length = min(len(continuation), len(whole) - 1)
    return Request(tuple(whole[:-length]), tuple(whole[-length:]))


def sampling_of(settings: Mapping[str, Any]) -> Sampling:
    """The sampling of a task's settings: greedy but where `do_sample` is set."""
    if not settings.get("do_sample"):
        return GREEDY
    return Sampling(float(settings.get("temperature", 1.0)), float(settings.get("top_p", 1.0)))
