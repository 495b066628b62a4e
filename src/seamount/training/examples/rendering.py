"""Samples become examples: `Renderer`, the one place where it is decided which tokens are learned.

Called by `stream`, which hands over many at once. The prompt of an example is token for token what the engine is given
for the same messages; learned is what the model must then write by itself, up to and with the token that ends it.
Knows no files and no network.

An assistant's turn stands in the history of later ones as the template renders it there. Where those are the tokens
that the model would have written behind its own prompt, it is learned in the same example; where they are others (a
template strips reasoning, say), it gets an example of its own, which ends with it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Literal

from seamount.core.errors import CheckpointError, ConfigError, InvalidRequestError, SeamountError
from seamount.models.conversation import Conversation, render_views
from seamount.models.prompt import PromptEncoder
from seamount.models.reasoning import THINK_OPEN

from .alignment import STAND_IN, AlignmentError, Turn, made_completion, own_completion
from .example import Example
from .joining import Plan, example_of, join, plan
from .plain import encode_plain
from .record import RecordError
from .sample import Sample

Thinking = Literal["auto", "on", "off"]
TrainOn = Literal["last", "all"]
View = tuple[Conversation, Mapping[str, Any]]
_RULES = 2  # changes when the same record may become other examples


@dataclass(slots=True)
class _Job:
    """One sample on its way."""

    sample: Sample
    messages: tuple[dict[str, Any], ...]
    chat: Conversation | None = None
    numbers: list[int] = field(default_factory=list)  # of the turns to learn
    turns: dict[int, Turn] = field(default_factory=dict)
    completions: dict[int, str] = field(default_factory=dict)
    examples: list[Example] = field(default_factory=list)
    error: RecordError | None = None

    def view(
        self, number: int, *, prompted: bool, switches: Mapping[str, bool], last: Mapping[str, Any] | None = None
    ) -> View:
        """What the template renders of this sample."""
        if self.chat is None:
            raise ValueError("plain text has no views")
        return self.chat, self.chat.view(number, prompted=prompted, switches=switches, last=last)

    def message(self, number: int) -> Mapping[str, Any]:
        """A turn, disarmed."""
        return self.messages[number] if self.chat is None else self.chat.messages[number]

    @property
    def is_untagged(self) -> bool:
        """Whether the template never opens reasoning, so that the model does."""
        return self.chat is not None and THINK_OPEN not in self.chat.template.source

    def fail(self, number: int, cause: SeamountError | AlignmentError) -> None:
        reason = f"cannot be rendered: {cause.message}" if isinstance(cause, SeamountError) else str(cause)
        hint = cause.hint if isinstance(cause, SeamountError) else None
        where = self.sample.fields[number] if self.sample.fields else ""
        self.error = self.error or self.sample.error(where, reason.rstrip("."), hint=hint)


class Renderer:
    """Makes examples for one checkpoint.

    Args:
        encoder: the checkpoint's.
        max_length: tokens of an example; longer ones are errors that say so (`RecordError.is_overlong`).
        train_on: all assistant turns, or only the last of each conversation; what a record says of a turn goes before.
        thinking: whether the model is asked to reason. auto: where the turn has reasoning, and else as a server does
            that is asked for nothing; off leaves the records' reasoning out.

    Raises:
        ConfigError: the model cannot be asked to reason, or not to.
    """

    def __init__(
        self, encoder: PromptEncoder, *, max_length: int, train_on: TrainOn = "all", thinking: Thinking = "auto"
    ) -> None:
        self.max_length = max_length
        self._encoder = encoder
        self._train_on = train_on
        self._thinking = thinking
        self._switches = {on: encoder.thinking_switches(on=on) for on in (True, False)}
        if thinking != "auto" and self._switches[thinking == "on"] is None:
            raise ConfigError(
                f"This model cannot be trained with thinking {thinking}: its template has no such prompt.",
                hint="Use auto.",
            )
        self._ends = tuple(encoder.tokenizer.added_tokens.get(i, "") for i in encoder.eos_token_ids)
        self._ends = tuple(end for end in self._ends if end)
        if not self._ends:
            raise CheckpointError(
                "The checkpoint names no token that ends an answer, so a tuned model would never stop.",
                hint="Set eos_token_id in generation_config.json.",
            )

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that change when the same sample may become other examples."""
        said = [_RULES, self._encoder.digest(), self.max_length, self._train_on, self._thinking]
        return blake2b(json.dumps(said).encode(), digest_size=8).hexdigest()

    def example(self, sample: Sample) -> Example:
        """Return the example that ends with the sample's last learned turn.

        Raises:
            RecordError: as of `examples`.
        """
        return self.examples(sample)[0]

    def examples(self, sample: Sample, *, cut: bool = False) -> list[Example]:
        """Return a sample's examples, the longest first.

        Args:
            cut: leave the end of those over `max_length` away.

        Raises:
            RecordError: there is nothing to learn, an example is over-long, or the chat template cannot write a turn.
            ConfigError: the checkpoint has no chat template, and the sample is a conversation.
        """
        made = self.render([sample], cut=cut)[0]
        if isinstance(made, RecordError):
            raise made
        return made

    def render(self, samples: Sequence[Sample], *, cut: bool = False) -> list[list[Example] | RecordError]:
        """Return for each sample what `examples` gives or raises; much faster for many than one by one."""
        jobs = [self._open(sample) for sample in samples]
        self._complete([job for job in jobs if job.chat is not None])
        self._join([job for job in jobs if job.error is None])
        for job in jobs:
            self._finish(job, cut=cut)
        return [job.examples if job.error is None else job.error for job in jobs]

    def _open(self, sample: Sample) -> _Job:
        messages = sample.messages
        if sample.prompt and self._encoder.has_chat_template:
            messages = ({"role": "user", "content": sample.prompt}, {"role": "assistant", "content": sample.completion})
        if self._thinking == "off":
            messages = tuple({k: v for k, v in m.items() if k != "reasoning_content"} for m in messages)
        job = _Job(sample, messages)
        if not messages:
            return job
        job.numbers = self._learned(sample, messages)
        if not job.numbers:
            job.error = sample.error("", "has no turn to learn: all of it is masked")
        elif job.numbers[0] == 0:
            job.error = sample.error(
                sample.fields[0], "begins the conversation, so nothing asks for it", hint='Give it "loss": false.'
            )
        else:
            try:
                job.chat = self._encoder.open_chat(messages, tools=sample.tools or None)
            except ConfigError:
                raise
            except SeamountError as cause:
                job.error = sample.error(
                    "messages", f"cannot be rendered: {cause.message.rstrip('.')}", hint=cause.hint
                )
        return job

    def _learned(self, sample: Sample, messages: Sequence[dict[str, Any]]) -> list[int]:
        loss = sample.loss or (None,) * len(messages)
        numbers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        by_rule = numbers if self._train_on == "all" else numbers[-1:]
        return [n for n in numbers if loss[n] or (loss[n] is None and n in by_rule)]

    def _complete(self, jobs: Sequence[_Job]) -> None:
        """Find what the model must write at each turn; the template's process is asked twice, for all of them."""
        wanted = [(job, number) for job in jobs for number in job.numbers]
        views: list[View] = []
        for job, number in wanted:
            switches = self._asked(job, number)
            views.append(job.view(number, prompted=True, switches=switches))
            views.append(job.view(number + 1, prompted=False, switches=switches))
        texts = iter(render_views(views))
        rest = []
        for job, number in wanted:
            prompt, whole = next(texts), next(texts)
            if not isinstance(prompt, str):
                job.fail(number, prompt)
            elif not isinstance(whole, str):
                job.fail(number, whole)
            else:
                job.turns[number] = turn = Turn(job.message(number), prompt, self._ends)
                completion = own_completion(turn, whole)
                if completion is None:
                    rest.append((job, number))
                else:
                    job.completions[number] = completion
        self._make(rest)

    def _make(self, wanted: Sequence[tuple[_Job, int]]) -> None:
        """Put together what templates do not write by themselves."""
        views: list[View] = []
        for job, number in wanted:
            message = {k: v for k, v in job.message(number).items() if k in ("role", "content", "tool_calls")}
            for last in ({"role": "assistant", "content": STAND_IN}, message):
                views.append(job.view(number, prompted=False, last=last, switches=self._asked(job, number)))
        texts = iter(render_views(views))
        for job, number in wanted:
            shown, bare = next(texts), next(texts)
            if not isinstance(shown, str):
                job.fail(number, shown)
            elif not isinstance(bare, str):
                job.fail(number, bare)
            else:
                writes_tags = job.is_untagged and self._switches[True] is not None
                calls = self._encoder.tool_format
                try:
                    job.completions[number] = made_completion(
                        job.turns[number], shown, bare, calls, writes_tags=writes_tags
                    )
                except AlignmentError as cause:
                    job.fail(number, cause)

    def _asked(self, job: _Job, number: int) -> dict[str, bool]:
        if self._thinking == "auto" and not job.messages[number].get("reasoning_content"):
            return {}
        return self._switches[self._thinking != "off"] or {}

    def _join(self, jobs: Sequence[_Job]) -> None:
        """Make the examples, encoding all texts at once; where one cannot be, each sample by itself."""
        try:
            self._join_all(jobs)
        except InvalidRequestError as cause:
            if len(jobs) == 1:
                jobs[0].fail(jobs[0].numbers[-1] if jobs[0].numbers else 0, cause)
            for job in jobs if len(jobs) > 1 else ():
                self._join([job])

    def _join_all(self, jobs: Sequence[_Job]) -> None:
        wanted = [(job, each) for job in jobs if job.chat is not None for each in self._plans(job, job.numbers)]
        while wanted:
            joined = join([each for _, each in wanted], self._encoder.tokenizer)
            left = []
            for (job, each), (example, unlearned) in zip(wanted, joined, strict=True):
                if int(example.token_ids[-1]) not in self._encoder.eos_token_ids:
                    job.fail(each.number, AlignmentError("does not end with a token that ends answers"))
                job.examples.append(example)
                left += [(job, alone) for number in unlearned for alone in self._plans(job, [number])]
            wanted = left
        for job in jobs:
            if job.chat is None:
                job.examples.append(self._plain(job.sample))

    def _plans(self, job: _Job, numbers: Sequence[int]) -> list[Plan]:
        literals = {} if job.chat is None else job.chat.literals
        return plan(job.turns, job.completions, numbers, literals)

    def _plain(self, sample: Sample) -> Example:
        prompt = encode_plain(self._encoder, [sample.prompt])[0] if sample.prompt else ()
        words = encode_plain(self._encoder, [sample.completion], inside=bool(sample.prompt))[0]
        token_ids = (*prompt, *words, self._encoder.eos_token_ids[0])
        return example_of(token_ids, [(len(prompt), len(token_ids))])

    def _finish(self, job: _Job, *, cut: bool) -> None:
        longest = max((len(example.token_ids) for example in job.examples), default=0)
        if job.error is not None or longest <= self.max_length:
            return
        if not cut:
            job.error = job.sample.error(
                "",
                f"has {longest} tokens, and {self.max_length} is the most",
                hint="Allow more, or have over-long ones skipped or cut.",
                is_overlong=True,
            )
            return
        end = self.max_length
        job.examples = [Example(example.token_ids[:end], example.trained[:end]) for example in job.examples]
        if not all(example.trained.any() for example in job.examples):
            job.error = job.sample.error(
                "", f"has nothing to learn within its first {end} tokens", hint="Allow more.", is_overlong=True
            )
