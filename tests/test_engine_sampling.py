"""Choosing tokens, the rows' own random streams, and how answers end."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tiny import BATCHES, Prompt, Row, complete, lively_model, make_engine, make_prompts, record_logits, run_alone
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from trimming import KeepAll, TrimmedLlama
from trimming.engine import Completion, Sampling
from trimming.engine.sampling import GREEDY, choose

SETTINGS = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.3),
    Sampling(temperature=2.5),
    Sampling(temperature=1.0, top_k=1),
    Sampling(temperature=0.7, top_k=5),
    Sampling(temperature=1.0, top_k=1000),
    Sampling(temperature=1.0, top_p=0.9),
    Sampling(temperature=1.5, top_p=0.3),
    Sampling(temperature=1.0, top_p=1e-9),
    Sampling(temperature=1.0, top_p=1.0),
    Sampling(temperature=0.9, top_k=12, top_p=0.8),
    Sampling(temperature=1.3, top_k=3, top_p=0.99),
]


def make_logits(rows: int, vocabulary: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


def named(sampling: Sampling) -> str:
    return f"t{sampling.temperature}-k{sampling.top_k}-p{sampling.top_p}"


def plainly(logits: Sequence[float], sampling: Sampling) -> list[tuple[int, float]]:
    """(token, probability) of the tokens that stay, likeliest first."""
    order = sorted(range(len(logits)), key=lambda token: -logits[token])
    order = order[: sampling.top_k or len(order)]
    weights = [math.exp((logits[token] - logits[order[0]]) / sampling.temperature) for token in order]
    probability = [weight / sum(weights) for weight in weights]
    stay, mass = 0, 0.0
    while stay < len(order) and (sampling.top_p is None or mass < sampling.top_p):
        mass += probability[stay]
        stay += 1
    return [(token, p / mass) for token, p in zip(order[:stay], probability, strict=False)]


# ---- one choice ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", SETTINGS, ids=named)
def test_choices_are_what_plain_python_says(sampling: Sampling) -> None:
    for row in make_logits(6, 50):
        expected = plainly(row.tolist(), sampling)
        ends = [sum(p for _, p in expected[: i + 1]) for i in range(len(expected))]
        chance = random.Random(0)
        draws = [0.0, *(chance.random() for _ in range(60)), 1 - 2**-53]
        # In the middle of each token's share, so that every one that stays is met.
        draws += [end - p / 2 for end, (_, p) in zip(ends, expected, strict=True) if p > 1e-5]
        found = choose(row.expand(len(draws), -1), [sampling] * len(draws), draws)
        for draw, token in zip(draws, found.tolist(), strict=True):
            # Where a draw falls on a boundary, rounding may decide.
            near = [t for end, (t, p) in zip(ends, expected, strict=True) if end - p - 1e-5 <= draw <= end + 1e-5]
            assert token in near
            assert len(near) == 1 or min(abs(draw - end) for end in [0.0, *ends]) < 1e-4


@pytest.mark.parametrize("sampling", SETTINGS, ids=named)
def test_the_tokens_that_stay_are_transformers(sampling: Sampling) -> None:
    logits = make_logits(6, 50, seed=1)
    scores = TemperatureLogitsWarper(sampling.temperature)(None, logits)
    if sampling.top_k is not None:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)
    if sampling.top_p is not None:
        scores = TopPLogitsWarper(sampling.top_p)(None, scores)
    for row, warped in zip(logits, scores, strict=True):
        expected = plainly(row.tolist(), sampling)
        assert {token for token, _ in expected} == set(warped.isfinite().nonzero()[:, 0].tolist())
        for token, p in expected:
            assert warped.softmax(-1)[token].item() == pytest.approx(p, rel=1e-4, abs=1e-9)
        draws = [i / 3000 for i in range(3000)]
        met = set(choose(row.expand(len(draws), -1), [sampling] * len(draws), draws).tolist())
        assert met <= {token for token, _ in expected}
        assert met >= {token for token, p in expected if p > 1e-3}


def test_boundaries() -> None:
    """Four equal tokens, exact in floating point: a share holds its beginning and not its end; a mass that is reached is
    enough."""
    logits = torch.zeros(1, 4)
    for draw, token in ((0.0, 0), (0.2499, 0), (0.25, 1), (0.5, 2), (0.75, 3)):
        assert choose(logits, [Sampling(temperature=1.0)], [draw]).item() == token
    halves = [Sampling(temperature=1.0, top_p=0.5)] * 4
    assert choose(logits.expand(4, -1), halves, [0.0, 0.49, 0.5, 0.999]).tolist() == [0, 0, 1, 1]


def test_greedy_takes_the_likeliest_whatever_is_drawn() -> None:
    logits = make_logits(40, 50)
    draws = [i / 40 for i in range(40)]
    assert choose(logits, [GREEDY] * 40, draws).tolist() == logits.argmax(-1).tolist()
    assert choose(logits.bfloat16(), [GREEDY] * 40, draws).tolist() == logits.bfloat16().argmax(-1).tolist()


def test_rows_of_one_batch_are_chosen_apart() -> None:
    samplings = [GREEDY, *SETTINGS, GREEDY]
    logits = make_logits(len(samplings), 50)
    draws = [random.Random(7).random() for _ in samplings]
    together = choose(logits, samplings, draws).tolist()
    assert together == [choose(logits[i : i + 1], [s], [draws[i]]).item() for i, s in enumerate(samplings)]
    order = list(reversed(range(len(samplings))))
    turned = choose(logits[order], [samplings[i] for i in order], [draws[i] for i in order]).tolist()
    assert turned == together[::-1]


def test_no_token_falls_out_of_a_large_vocabulary() -> None:
    """With no filter every one of 128 256 equal tokens can be drawn, the last one too."""
    count = 128_256
    logits = torch.zeros(1, count)
    for place in (0, 1, count // 2, count - 2, count - 1):
        for sampling in (Sampling(temperature=1.0), Sampling(temperature=1.0, top_p=1.0)):
            assert choose(logits, [sampling], [(place + 0.5) / count]).item() == place


def test_extreme_logits() -> None:
    sampling = Sampling(temperature=0.5, top_p=0.9)
    one = torch.full((1, 9), -1e30)
    one[0, 4] = 1e30
    forbidden = torch.full((1, 9), -torch.inf)
    forbidden[0, 2] = 0.0
    for draw in (0.0, 0.5, 1 - 2**-53):
        assert choose(one, [sampling], [draw]).item() == 4
        assert choose(forbidden, [sampling], [draw]).item() == 2


@pytest.mark.parametrize("temperature", [5e-324, 1e-40, 1.1e-38, 1.2e-38, 1e-30, 1e-6, 1e-3])
def test_near_zero_a_temperature_takes_the_likeliest(temperature: float) -> None:
    """The likeliest logits are 0.01 and more above the others."""
    logits = make_logits(8, 50).mul(100).round().div(100)
    logits[torch.arange(8), logits.argmax(-1)] += 0.02
    logits[0, :5] = -torch.inf
    logits[1] -= 100
    logits[2] *= 1e30
    for draw in (0.0, 0.5, 1 - 2**-53):
        for sampling in (Sampling(temperature=temperature), Sampling(temperature=temperature, top_k=4, top_p=0.9)):
            assert choose(logits, [sampling] * 8, [draw] * 8).tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [1.2e-38, 1e-20, 1e-4])
def test_equal_logits_share_at_any_temperature(temperature: float) -> None:
    """Divided by such a temperature as they are, the logits would be infinite, or too coarse to add up to a half."""
    logits = torch.tensor([[50.0, 900.0, 900.0, -torch.inf]])
    sampling = Sampling(temperature=temperature)
    assert [choose(logits, [sampling], [draw]).item() for draw in (0.0, 0.49, 0.5, 0.99)] == [1, 1, 2, 2]


@pytest.mark.parametrize("temperature", [1e30, 1e39, 1e300])
def test_a_high_temperature_makes_all_tokens_equal_but_for_forbidden_ones(temperature: float) -> None:
    logits = torch.tensor([[5.0, -torch.inf, 7.0, 1.0, 2.0]])
    sampling = Sampling(temperature=temperature)
    assert [choose(logits, [sampling], [draw]).item() for draw in (0.1, 0.3, 0.6, 0.9)] == [2, 0, 4, 3]


def test_more_tokens_than_there_are_leave_all() -> None:
    """A number that no tensor holds would be the end of the other rows too."""
    logits = make_logits(1, 50)
    for draw in (0.0, 0.5, 0.999):
        found = choose(logits, [Sampling(temperature=2.0, top_k=1 << 70)], [draw])
        assert found.tolist() == choose(logits, [Sampling(temperature=2.0)], [draw]).tolist()


def test_who_is_greedy() -> None:
    assert [Sampling(temperature=t).greedy for t in (0, 0.0, 1e-40, 1.1e-38, 1.2e-38, 0.5)] == [True] * 4 + [False] * 2


def test_a_row_of_nan_disturbs_no_other() -> None:
    """It has no right answer, but on a GPU an index out of range would be the end of all rows."""
    logits = make_logits(3, 50)
    logits[1] = torch.nan
    for sampling in (GREEDY, *SETTINGS):
        found = choose(logits, [sampling] * 3, [0.4] * 3).tolist()
        assert 0 <= found[1] < 50
        assert found[::2] == choose(logits[::2], [sampling] * 2, [0.4] * 2).tolist()


@pytest.mark.parametrize("sampling", [SETTINGS[0], SETTINGS[4], SETTINGS[7], SETTINGS[10]], ids=named)
def test_many_draws_follow_the_distribution(sampling: Sampling) -> None:
    count = 20_000
    (row,) = make_logits(1, 12, seed=2) / 2
    expected = dict(plainly(row.tolist(), sampling))
    draws = sampling.stream("a row", count)
    found = choose(row.expand(count, -1), [sampling] * count, draws).bincount(minlength=12).tolist()
    assert all(expected.get(token) or not seen for token, seen in enumerate(found))
    squares = sum((found[token] - count * p) ** 2 / (count * p) for token, p in expected.items())
    # The mean of chi-square is its degrees of freedom; five deviations above is one in a million.
    freedom = len(expected) - 1
    assert squares <= freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"temperature": 1.0, "top_k": 0}, "top_k=0"),
        ({"temperature": 1.0, "top_k": -3}, "top_k=-3"),
        ({"temperature": 1.0, "top_k": 2.5}, r"top_k=2\.5 must be a whole number"),
        ({"temperature": 1.0, "top_k": True}, "top_k=True must be a whole number"),
        ({"temperature": 1.0, "top_p": 0.0}, r"top_p=0\.0"),
        ({"temperature": 1.0, "top_p": 1.01}, r"top_p=1\.01"),
        ({"temperature": 1.0, "top_p": math.nan}, "top_p=nan"),
        ({"seed": 1.0}, r"seed=1\.0 must be a whole number"),
        ({"seed": None}, "seed=None must be a whole number"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_settings_out_of_range_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Sampling(**fields)


# ---- streams ------------------------------------------------------------------------------------------------------------


def test_a_stream_is_the_ids_and_the_seeds() -> None:
    stream = Sampling(temperature=1.0, seed=3).stream("a", 50)
    assert list(stream) == list(Sampling(temperature=0.2, top_k=4, seed=3).stream("a", 50))
    # A longer answer begins with the same numbers.
    assert list(Sampling(seed=3).stream("a", 80))[:50] == list(stream)
    assert all(0 <= number < 1 for number in stream)
    others = [Sampling(seed=4).stream("a", 50), Sampling(seed=3).stream("b", 50), Sampling(seed=3).stream("", 50)]
    assert all(set(stream).isdisjoint(other) for other in others)
    # The id does not run into the seed.
    assert list(Sampling(seed=1).stream("1a", 5)) != list(Sampling(seed=11).stream("a", 5))


WARM = Sampling(temperature=0.9, top_k=30, top_p=0.95, seed=5)


@pytest.fixture(scope="module")
def asked() -> list[Prompt]:
    return make_prompts([*BATCHES["mixed tiles"], Row(()), Row((2, 1))])


def sampled(prompts: dict[str, Prompt], sampling: Sampling = WARM, **options: Any) -> dict[str, list[int]]:
    engine = make_engine(TrimmedLlama(0.3), **options)
    completions = complete(engine, [p.request(id, 16, sampling=sampling) for id, p in prompts.items()])
    return {id: completion.tokens for id, completion in zip(prompts, completions, strict=True)}


@pytest.mark.parametrize("slots", [1, 2, 3], ids="{}-slots".format)
def test_a_row_says_the_same_whatever_runs_beside_it(asked: list[Prompt], slots: int) -> None:
    """Rounding differs with the batch, here by 1e-6: none of these draws falls that close to another token."""
    rows = dict(zip("abcdef", asked, strict=True))
    together = sampled(rows)
    assert len({tuple(tokens) for tokens in together.values()}) == len(rows)
    assert sampled(dict(reversed(rows.items())), max_sequences=slots) == together
    for id, prompt in rows.items():
        assert sampled({id: prompt}) == {id: together[id]}


def test_a_rows_nth_token_is_its_nth_draws(asked: list[Prompt]) -> None:
    engine = make_engine(max_sequences=2)
    logits = record_logits(engine)
    completions = complete(engine, [p.request(str(i), 16, sampling=WARM) for i, p in enumerate(asked)])
    for number, completion in enumerate(completions):
        rows, draws = torch.stack(logits[str(number)]), WARM.stream(str(number), 16)
        assert completion.tokens == choose(rows, [WARM] * 16, draws).tolist()


def test_other_ids_and_other_seeds_say_other_things(asked: list[Prompt]) -> None:
    rows = dict.fromkeys("abcd", asked[0])
    together = sampled(rows)
    assert len({tuple(tokens) for tokens in together.values()}) == 4
    other = sampled(rows, Sampling(temperature=0.9, top_k=30, top_p=0.95, seed=6))
    assert not any(other[id] == together[id] for id in rows)
    assert sampled(rows) == together


def test_rows_of_all_kinds_side_by_side(asked: list[Prompt]) -> None:
    samplings = [GREEDY, WARM, Sampling(temperature=2.0, top_k=3), GREEDY, Sampling(temperature=0.5), WARM]
    requests = [p.request(str(i), 12, sampling=s) for i, (p, s) in enumerate(zip(asked, samplings, strict=True))]
    together = complete(make_engine(), requests)
    for number, (request, completion) in enumerate(zip(requests, together, strict=True)):
        (alone,) = complete(make_engine(), [request])
        assert completion.tokens == alone.tokens
        if samplings[number] == GREEDY:
            assert completion.tokens == run_alone(lively_model(), asked[number], "", KeepAll(), new_tokens=12).tokens


# ---- how answers end ----------------------------------------------------------------------------------------------------

LETTERS = "".join(chr(0x21 + token) for token in range(64))


def spell(tokens: Sequence[int]) -> str:
    return "".join(LETTERS[token] for token in tokens)


@pytest.fixture(scope="module")
def prompt() -> Prompt:
    return make_prompts([Row((2,), after=5)], seed=2)[0]


@pytest.fixture(scope="module")
def plain(prompt: Prompt) -> list[int]:
    """Its first 12 tokens, nothing ending it."""
    tokens = run_alone(lively_model(), prompt, "0", KeepAll(), new_tokens=12).tokens
    assert len(set(tokens)) >= 8
    return tokens


def answer(prompt: Prompt, new_tokens: int = 12, eos: Sequence[int] = (), spelling: bool = True, **options: Any) -> Completion:
    engine = make_engine(eos=eos, detokenize=spell if spelling else None)
    return complete(engine, [prompt.request("0", new_tokens, **options)])[0]


def test_an_answer_as_long_as_it_may_be(prompt: Prompt, plain: list[int]) -> None:
    for length in (1, 2, 12):
        found = answer(prompt, length)
        assert (found.tokens, found.text) == (plain[:length], spell(plain[:length]))
        assert (found.finish_reason, found.output_tokens) == ("length", length)
    assert answer(prompt, 3, spelling=False).text is None


def test_an_answer_of_one_token_takes_no_decode_step(prompt: Prompt) -> None:
    engine = make_engine()
    complete(engine, [prompt.request(str(i), 1) for i in range(3)])
    assert (engine.statistics.decode_steps, engine.statistics.decode_tokens, engine.statistics.peak_sequences) == (0, 0, 3)


@pytest.mark.parametrize("place", [0, 1, 5])
def test_an_end_token_ends_the_answer_and_is_no_part_of_it(prompt: Prompt, plain: list[int], place: int) -> None:
    end = plain[place]
    first = plain.index(end)
    found = answer(prompt, eos=[63 if 63 not in plain else 0, end])
    assert (found.tokens, found.text) == (plain[:first], spell(plain[:first]))
    assert (found.finish_reason, found.output_tokens) == ("stop", first + 1)
    # Said as the last token that is allowed, it is an end all the same.
    assert answer(prompt, first + 1, eos=[end]).finish_reason == "stop"


def test_an_end_token_is_no_text(prompt: Prompt, plain: list[int]) -> None:
    """Of the other rows neither: each ends by itself."""
    engine = make_engine(eos=[plain[4]], detokenize=spell)
    others = make_prompts([Row((1,)), Row((3,))])
    found = complete(engine, [p.request(str(i), 12) for i, p in enumerate([others[0], prompt, others[1]])])
    wanted = [complete(make_engine(eos=[plain[4]]), [p.request("", 12)])[0] for p in (others[0], prompt, others[1])]
    assert [c.tokens for c in found] == [c.tokens for c in wanted]
    assert all(c.text == spell(c.tokens) for c in found)


@pytest.mark.parametrize(
    ("stops", "cut", "said"),
    [
        ([(3, 4)], 3, 4),
        ([(2, 5)], 2, 5),
        ([(0, 1)], 0, 1),
        ([(5, 7), (3, 4)], 3, 4),
        # Complete at the same token: the earlier beginning counts, whichever was named first.
        ([(4, 6), (3, 6)], 3, 6),
        ([(3, 6), (4, 6)], 3, 6),
        # The longer one begins earlier, the shorter one is complete earlier: text is cut where there is something to cut.
        ([(2, 7), (4, 5)], 4, 5),
        ([(10, 12)], 10, 12),
    ],
    ids=["one-token", "several-tokens", "first", "two", "overlapping", "overlapping-turned", "nested", "last"],
)
def test_stop_strings(prompt: Prompt, plain: list[int], stops: list[tuple[int, int]], cut: int, said: int) -> None:
    texts = [spell(plain[a:b]) for a, b in stops]
    text = spell(plain)
    assert [text.index(t) for t in texts] == [a for a, _ in stops]
    found = answer(prompt, stop=["@@@", *texts])
    assert (found.text, found.finish_reason, found.output_tokens) == (text[:cut], "stop", said)
    assert found.tokens == plain[:said]


def test_stop_strings_that_do_not_come(prompt: Prompt, plain: list[int]) -> None:
    found = answer(prompt, stop=[spell(plain) + "!", "@@@", "\ud800"])
    assert (found.text, found.finish_reason, found.output_tokens) == (spell(plain), "length", 12)


def test_a_stop_string_within_a_tokens_text(prompt: Prompt, plain: list[int]) -> None:
    engine = make_engine(detokenize=lambda tokens: "".join(f"<{token}>" for token in tokens))
    (found,) = complete(engine, [prompt.request("0", 12, stop=[f"{plain[3]}"])])
    first = next(i for i, token in enumerate(plain) if f"{plain[3]}" in f"<{token}>")
    wanted = "".join(f"<{token}>" for token in plain[: first + 1])
    assert found.text == wanted[: wanted.index(f"{plain[3]}")]
    assert found.output_tokens == first + 1


def test_a_stop_string_across_bytes_of_characters(prompt: Prompt, plain: list[int]) -> None:
    """Tokens that are bytes, as a tokenizer has them for rare characters; among them one that says nothing."""
    start = next(i for i in range(1, 9) if len({*plain[i : i + 4]} - {*plain[:i]}) == 4)
    pieces = dict(zip(plain[start : start + 4], (b"\xc3", b"\xa9", b"", b"!"), strict=True))
    engine = make_engine(
        detokenize=lambda tokens: b"".join(pieces.get(token, b"-") for token in tokens).decode(errors="replace")
    )
    (found,) = complete(engine, [prompt.request("0", 12, stop=["é!"])])
    assert (found.text, found.finish_reason, found.output_tokens) == ("-" * start, "stop", start + 4)


def test_stop_strings_are_looked_for_in_the_last_tokens_alone(prompt: Prompt) -> None:
    """Reading all of the answer at every step would take time by the square of its length."""
    read: list[int] = []

    def detokenize(tokens: Sequence[int]) -> str:
        read.append(len(tokens))
        return spell(tokens)

    (found,) = complete(make_engine(detokenize=detokenize), [prompt.request("0", 60, stop=["@@@"])])
    assert found.output_tokens == 60
    assert read == [*range(1, 12), *[11] * 49, 60]


def test_a_stop_string_that_its_last_tokens_do_not_show_is_cut_off_all_the_same(prompt: Prompt, plain: list[int]) -> None:
    """More tokens without text than are reckoned with: it is found when the answer ends."""
    shown = {0: "<", 11: ">"}
    (found,) = complete(
        make_engine(detokenize=lambda tokens: "".join(shown.get(i, "") for i in range(len(tokens)))),
        [prompt.request("0", 12, stop=["<>"])],
    )
    assert (found.text, found.finish_reason, found.tokens) == ("", "stop", plain)


def test_stop_strings_are_a_rows_own(prompt: Prompt, plain: list[int]) -> None:
    stop = [spell(plain[2:4])]
    engine = make_engine(detokenize=spell)
    found = complete(engine, [prompt.request("0", 12, stop=stop), prompt.request("1", 12), prompt.request("2", 3, stop=stop)])
    assert [c.text for c in found] == [spell(plain[:2]), spell(plain), spell(plain[:3])]
    assert [c.finish_reason for c in found] == ["stop", "length", "length"]
