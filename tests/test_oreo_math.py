"""oreo.py's mathematics: the published code's numbers (tests/vectors/oreo.json, float64), closed forms, a tree."""

import itertools
import math

import pytest
import torch

import oreo
from common.data import InputError
from common.logprobs import linear_kl, logprobs_from_logits
from common.rows import conversation_ids, read_row
from common.search import Candidate, beam_search, select_beam, step_ids, step_starts
from common.trainer import learning_rate, make_optimizer, optimizer_step
from common.verifiers import grade
from oreo import Args, Row, accumulate_gradient, oreo_losses, oreo_row_losses
from tests.conftest import assert_equal, f64, vectors, write_rows
from tests.ranks import ONE_RANK

VECTORS = vectors("oreo")
CASES = [(case, name) for case in VECTORS["cases"] for name in ("token", "step", "response", "dqo")
         if name in case["outputs"]]  # fmt: skip


# --------------------------------------------------------------------------------- losses, against the published


def given(case):
    """(logp, ref_logp, values, action_mask, state_mask, rewards) of a case; its masks are of tokens, ours of
    predictions: token t + 1 is an action, the text up to token t is a state."""
    inputs = case["inputs"]
    targets = torch.tensor(inputs["ids"])[:, 1:]
    logits = [f64(inputs[name])[:, : targets.shape[1]] for name in ("policy_logits", "ref_logits")]
    logps = [
        logprobs_from_logits(z.flatten(0, 1), targets.flatten()).view_as(targets).clone() for z in logits
    ]
    masks = torch.tensor(inputs["action_mask"])[:, 1:], torch.tensor(inputs["state_mask"])[:, :-1]
    return logits, targets, (*logps, f64(inputs["values"]), *masks, f64(inputs["reward"]))


@pytest.mark.parametrize(("case", "variant"), CASES, ids=lambda x: x["id"] if isinstance(x, dict) else x)
def test_losses_and_their_gradients_are_the_published_ones(case, variant):
    _, _, (logp, ref_logp, values, *rest) = given(case)
    expected, beta = case["outputs"], case["flags"]["beta"]
    assert_equal(logp, expected["logps"])
    assert_equal(ref_logp, expected["ref_logps"])
    logp.requires_grad_()
    values.requires_grad_()
    policy_loss, value_loss = oreo_losses(logp, ref_logp, values, *rest, beta=beta, variant=variant)
    assert_equal(policy_loss.detach(), expected[variant]["policy_loss"])
    assert_equal(value_loss.detach(), expected["value_loss"]["loss"])
    policy_loss.backward()
    assert values.grad is None  # the policy never trains the value ...
    assert_equal(logp.grad, expected[variant]["grad_policy_loss_wrt_logps"])
    logp.grad = None
    value_loss.backward()
    assert logp.grad is None  # ... nor the value the policy
    assert_equal(values.grad, expected["value_loss"]["grad_values"])


@pytest.mark.parametrize(("case", "variant"), CASES, ids=lambda x: x["id"] if isinstance(x, dict) else x)
def test_the_kl_and_the_total_are_the_published_ones_without_a_softmax_in_memory(case, variant):
    """Hidden states are the logits and the head is the identity: linear_kl and linear_logprobs as in training."""
    (policy_logits, ref_logits), targets, (_, ref_logp, *rest) = given(case)
    expected, flags = case["outputs"][variant], case["flags"]
    logits = policy_logits.flatten(0, 1).requires_grad_()
    identity = torch.eye(logits.shape[1], dtype=torch.float64)
    kl = linear_kl(logits, identity, ref_logits.flatten(0, 1), identity).view_as(targets)  # [B, T]
    assert_equal(kl.detach(), expected["kl_per_token"])
    action = rest[1]
    mean_kl = ((kl * action).sum(1) / action.sum(1)).mean()
    assert_equal(mean_kl.detach(), expected["kl"])
    logp = logprobs_from_logits(logits, targets.flatten()).view_as(targets)
    policy_loss, _ = oreo_losses(logp, ref_logp, *rest, beta=flags["beta"], variant=variant)
    total = policy_loss + flags["kl_reg"] * mean_kl
    total.backward()
    assert_equal(total.detach(), expected["total"])
    published = f64(expected["grad_total_wrt_policy_logits"])[:, : targets.shape[1]]
    assert_equal(logits.grad.view_as(published), published)


@pytest.mark.parametrize("variant", ["token", "step", "response"])
def test_padding_on_either_side_and_what_stands_in_it_change_nothing(variant):
    case = VECTORS["cases"][2]
    _, _, inputs = given(case)
    expected = oreo_losses(*inputs, beta=0.5, variant=variant)
    for left, right in ((3, 0), (0, 2), (1, 4)):
        padded = [torch.nn.functional.pad(x, (left, right), value=9) for x in inputs[:3]]
        padded += [torch.nn.functional.pad(x, (left, right)) for x in inputs[3:5]]
        padded[0][:, :left] = padded[2][:, :left] = math.nan
        assert_equal(torch.stack(oreo_losses(*padded, inputs[5], beta=0.5, variant=variant)), torch.stack(expected))


# --------------------------------------------------------------------------------------------- closed forms


def random_rows(rows=4, width=7, seed=0, **masks):
    g = torch.Generator().manual_seed(seed)
    logp, ref, values = (-torch.rand(3, rows, width, generator=g, dtype=torch.float64)).unbind()
    action = masks.get("action", torch.ones(rows, width, dtype=torch.bool))
    state = masks.get("state", action)
    return logp.requires_grad_(), ref, -values, action, state, f64([1, 0, 1, 0][:rows])


def test_the_gradient_of_a_token_is_two_beta_delta_over_its_rows_states():
    logp, ref, values, action, state, rewards = random_rows()
    beta = 0.3
    policy, _ = oreo_losses(logp, ref, values, action, state, rewards, beta=beta)
    policy.backward()
    suffix = torch.stack([(logp - ref)[:, t:].sum(1) for t in range(7)], 1)
    delta = values - rewards[:, None] + beta * suffix
    assert_equal(logp.grad, (2 * beta * delta / (7 * 4)).detach())


@pytest.mark.parametrize("variant", ["token", "step", "response"])
def test_where_policy_and_reference_agree_the_losses_are_the_values_squared_errors(variant):
    logp, _, values, action, _, rewards = random_rows()
    state = torch.tensor([[1, 0, 0, 1, 0, 1, 0]] * 4)
    policy, value = oreo_losses(logp, logp.detach(), values, action, state, rewards, beta=0.7, variant=variant)
    error = (values - rewards[:, None]).square()
    assert_equal(value, error[:, [0, 3, 5]].mean())
    assert_equal(policy.detach(), error[:, 0].mean() if variant == "response" else error[:, [0, 3, 5]].mean())


@pytest.mark.parametrize("variant", ["token", "step", "response"])
def test_as_beta_goes_to_zero_the_policys_gradient_vanishes_like_beta(variant):
    """2 beta (V - R) for each state whose action the token is part of, over the states and rows."""
    logp, ref, values, action, _, rewards = random_rows()
    state = torch.tensor([[1, 0, 0, 1, 0, 1, 0]] * 4)
    if variant == "token":
        state = action
    beta = 1e-9
    oreo_losses(logp, ref, values, action, state, rewards, beta=beta, variant=variant)[0].backward()
    delta = values - rewards[:, None]
    of = {"token": range(7), "step": [0, 0, 0, 3, 3, 5, 5], "response": [0] * 7}[variant]
    states = {"token": 7, "step": 3, "response": 1}[variant]
    assert_equal(logp.grad / beta, 2 * delta[:, list(of)] / (states * 4), 1e-7)


def test_the_variants_are_one_where_an_answer_is_one_action():
    inputs = random_rows(width=1)
    losses = [torch.stack(oreo_losses(*inputs, beta=0.2, variant=v)) for v in ("token", "step", "response")]
    logp, ref, values, *_, rewards = inputs
    closed = (values - rewards[:, None] + 0.2 * (logp - ref)).square().mean()
    for loss in losses:
        assert_equal(loss.detach(), [closed.item()] * 2)


def test_with_one_state_an_answer_step_and_response_are_one():
    state = torch.tensor([[0, 1, 0, 0, 0, 0, 0]] * 4)
    grads = []
    for variant in ("step", "response"):
        inputs = random_rows(state=state)
        oreo_losses(*inputs, beta=0.2, variant=variant)[0].backward()
        grads.append(inputs[0].grad)
    assert_equal(grads[0], grads[1])


def test_tokens_of_the_environment_take_no_part():
    """An observation between two actions: no term in the sums, no gradient, whatever its log-prob."""
    action = torch.tensor([[1, 1, 0, 0, 1, 1, 0]] * 4)
    a, b = random_rows(action=action), random_rows(action=action)
    with torch.no_grad():
        b[0][:, [2, 3, 6]] = -50.0
    for variant in ("token", "step", "response"):
        for x in (a, b):
            x[0].grad = None
            sum(oreo_losses(*x, beta=0.2, variant=variant)).backward()
        assert_equal(a[0].grad, b[0].grad)
        assert a[0].grad[:, [2, 3, 6]].abs().max() == 0


def test_wrong_shapes_variants_and_rows_without_a_state_are_refused():
    inputs = random_rows()
    with pytest.raises(ValueError, match="not five"):
        oreo_losses(*inputs[:3], inputs[3][:, 1:], *inputs[4:], beta=0.1)
    with pytest.raises(ValueError, match="variant 'turn'"):
        oreo_losses(*inputs, beta=0.1, variant="turn")
    state = torch.ones(4, 7).index_fill_(0, torch.tensor([2]), 0)
    with pytest.raises(ValueError, match=r"rows without a state: \[2\]"):
        oreo_losses(*inputs[:4], state, inputs[5], beta=0.1)


# --------------------------------------------------------------------------------------------- a tree, exactly


BRANCHES, DEPTH = 3, 4
NODES = sum(BRANCHES**d for d in range(DEPTH + 1))  # node n has the children 3 n + 1 .. 3 n + 3: an id is a state


class TreePolicy(torch.nn.Module):
    """Log-probs of the children of each node, from a table; as Policy, in float64."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits.clone())

    def forward(self, batch, *, reference=None):
        node, child = batch.input_ids[0, batch.predictors], (batch.targets - 1) % BRANCHES
        logps = self.logits[node].log_softmax(-1)
        chosen = logps.gather(1, child[:, None])[:, 0]
        if reference is None:
            return chosen
        ref = reference.logits[node].log_softmax(-1)
        return chosen, reference(batch), (logps.exp() * (logps - ref)).sum(-1)


class TreeValue(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.zeros(NODES, dtype=torch.float64))

    def forward(self, batch):
        return self.table[batch.input_ids[0, batch.predictors]]


def soft_optimum(ref_logits, leaf_rewards, beta):
    """Dynamic programming from the leaves: V = beta log sum ref exp(V' / beta), pi = ref exp((V' - V) / beta)."""
    inner = NODES - BRANCHES**DEPTH
    value = torch.cat([torch.zeros(inner, dtype=torch.float64), leaf_rewards])
    policy = torch.zeros(inner, BRANCHES, dtype=torch.float64)
    for n in reversed(range(inner)):
        log_weight = ref_logits[n].log_softmax(-1) + value[BRANCHES * n + 1 : BRANCHES * n + 1 + BRANCHES] / beta
        value[n] = beta * log_weight.logsumexp(-1)
        policy[n] = log_weight.softmax(-1)
    return value[:inner], policy


def test_token_level_oreo_on_offline_data_reaches_the_soft_optimal_policy_and_value_of_a_tree():
    g = torch.Generator().manual_seed(4)
    inner, beta = NODES - BRANCHES**DEPTH, 0.3
    ref_logits = torch.randn(inner, BRANCHES, generator=g, dtype=torch.float64)
    rewards = (torch.rand(BRANCHES**DEPTH, generator=g, dtype=torch.float64) < 0.3).double()
    rows = []
    for path in itertools.product(range(BRANCHES), repeat=DEPTH):  # every leaf once: not the reference's frequencies
        nodes = list(itertools.accumulate(path, lambda n, k: BRANCHES * n + 1 + k, initial=0))
        actions = [True] * DEPTH
        rows.append([Row([0], nodes[1:], actions, actions, rewards[nodes[-1] - inner].item(), index=len(rows))])
    reference = TreePolicy(ref_logits).requires_grad_(False)
    policy, value = TreePolicy(ref_logits), TreeValue()
    args, steps = Args(beta=beta, kl_coef=0.0), 200
    optimizers = [make_optimizer(m, lr=0.1, weight_decay=0.0) for m in (value, policy)]
    for step in range(steps):
        accumulate_gradient(policy, value, reference, rows, args, ONE_RANK)
        for model, optimizer in zip((value, policy), optimizers, strict=True):
            lr = learning_rate(step, lr=0.1, steps=steps, schedule="cosine")
            optimizer_step(model, optimizer, lr=lr, max_grad_norm=1e9)
    best_value, best_policy = soft_optimum(ref_logits, rewards, beta)
    value_error = (value.table[:inner] - best_value).abs().max().item()
    distance = 0.5 * (policy.logits.softmax(-1) - best_policy).abs().sum(-1).max().item()
    start = 0.5 * (ref_logits.softmax(-1) - best_policy).abs().sum(-1).max().item()
    assert start > 0.3  # the reference is far from it
    assert value_error < 0.02 and distance < 0.05, (value_error, distance)


# ------------------------------------------------------------------------------------------- masks from data


class CharTokenizer:
    """One id a character, <B> <E> <U> <A> being one each."""

    all_special_ids = all_special_tokens = ()

    def __init__(self, eos="<E>"):
        self.eos_token, self.special = eos, ["<B>", "<E>", "<U>", "<A>"]
        self.eos_token_id = 1
        self.chat_template, self.unk_token_id = "set", None

    def __len__(self):
        return 4 + 128

    def __call__(self, text, add_special_tokens=False):
        if isinstance(text, list):
            return {"input_ids": [self(one)["input_ids"] for one in text]}
        ids = []
        while text:
            mark = next((m for m in self.special if text.startswith(m)), None)
            ids.append(self.special.index(mark) if mark else 4 + ord(text[0]))
            text = text[len(mark) if mark else 1 :]
        return {"input_ids": ids}

    def convert_ids_to_tokens(self, token):
        return self.special[token] if token < 4 else chr(token - 4)

    def convert_tokens_to_ids(self, tokens):
        return [self.special.index(token) if token in self.special else None for token in tokens]

    def decode(self, ids):
        return self.batch_decode([ids])[0]

    def batch_decode(self, rows):
        return ["".join(self.special[i] if i < 4 else chr(i - 4) for i in row) for row in rows]

    def apply_chat_template(self, messages, *, chat_template=None, tokenize=False, add_generation_prompt=False):
        text = "<B>" + "".join(f"<{m['role'][0].upper()}>{m['content']}" for m in messages)
        return text + "<A>" * add_generation_prompt


@pytest.mark.parametrize("case", VECTORS["dataset_cases"], ids=lambda c: c["id"])
def test_masks_are_the_published_ones(case, tmp_path):
    """The published rows end in " " and eos; here the space is put into the response, and the eos comes by itself."""
    inputs, flags, outputs = case["inputs"], case["flags"], case["outputs"]
    tokenizer = CharTokenizer()
    if "conversations" in inputs:
        row, skip = inputs, 1
    else:
        row, skip = inputs | {"response": inputs["response"] + " "}, 0
    prompt_length = 0 if skip else len(tokenizer(inputs["prompt"])["input_ids"])
    args = Args(max_response_tokens=flags["max_length"] - prompt_length, long_response="cut", skip_turns=skip)
    [got], count = oreo.read_rows(write_rows(tmp_path / "rows.jsonl", [row]), tokenizer, args)
    tokens = tokenizer.batch_decode([[i] for i in got.prompt + got.response])
    assert tokens == outputs["tokens"]
    assert [0] * len(got.prompt) + [int(a) for a in got.actions] == outputs["action_mask"]
    state = got.steps if flags["step_level"] else got.actions
    assert [0] * (len(got.prompt) - 1) + [int(s) for s in state] + [0] == outputs["state_mask"]
    assert [got.reward] == outputs["reward"]
    assert count["response_too_long"] == (case["id"] == "token_truncated")


@pytest.mark.parametrize("eos", ["<E>", "<B>"])  # Qwen's base models close a turn with another token than eos
def test_what_closes_a_turn_is_an_action_and_what_the_template_puts_behind_it_is_not(eos):
    class Chat(CharTokenizer):
        def apply_chat_template(self, messages, *, add_generation_prompt=False, **_):
            text = "".join(f"<{m['role'][0].upper()}>{m['content']}<E>\n" for m in messages)
            return text + "<A>" * add_generation_prompt

    said = (("user", "q"), ("assistant", "a"), ("user", "o"), ("assistant", "b"))
    messages = [{"role": role, "content": content} for role, content in said]
    prompt, response, actions = conversation_ids(messages, Chat(eos), 0)
    assert "".join(Chat().batch_decode([[i] for i in prompt])) == "<U>q<E>\n<A>"
    assert "".join(Chat().batch_decode([[i] for i in response])) == "a<E>\n<U>o<E>\n<A>b<E>"
    assert actions == [True] * 2 + [False] * 6 + [True] * 2


@pytest.mark.parametrize("mark", [{"weight": 0}, {"loss": False}, {"train": False}])
def test_an_assistant_turn_that_is_marked_as_not_to_be_trained_is_context(mark):
    said = (("user", "q", {}), ("gpt", "a", {"loss": True}), ("user", "r", {"loss": None}), ("gpt", "OK", mark),
            ("user", "s", {}), ("gpt", "b", {}), ("user", "t", {}), ("gpt", "z", mark))  # fmt: skip
    turns = [{"from": role, "value": text} | more for role, text, more in said]
    item = read_row({"conversations": turns, "reward": 1}, "x")
    assert [turn["content"] for turn in item.prompt] == ["q", "a", "r", "OK", "s"]
    assert [trace.text for trace in item.traces] == ["b"]
    _, response, actions = conversation_ids(item.conversation, CharTokenizer(), 0)
    trained = [i for i, action in zip(response, actions, strict=True) if action]
    unmarked = [turn for turn in item.conversation if turn["content"] != "OK"]
    _, response, actions = conversation_ids(unmarked, CharTokenizer(), 0)
    assert trained == [i for i, action in zip(response, actions, strict=True) if action]
    with pytest.raises(InputError, match="to be trained"):
        read_row({"conversations": [turns[0], turns[3]], "reward": 1}, "x")


def test_a_template_that_rewrites_the_history_is_refused():
    class Forgets(CharTokenizer):
        def apply_chat_template(self, messages, **options):
            return super().apply_chat_template(messages[-1:], **options)

    messages = [{"role": r, "content": "x"} for r in ("user", "assistant", "user", "assistant")]
    with pytest.raises(InputError, match="keeps the history"):
        conversation_ids(messages, Forgets(), 0)


def test_a_template_that_drops_the_thoughts_of_earlier_turns_is_refused():
    class Drops(CharTokenizer):
        def apply_chat_template(self, messages, **options):
            *earlier, last = messages
            shown = [m | {"content": m["content"].rpartition("</think>")[2]} for m in earlier]
            return super().apply_chat_template([*shown, last], **options)

    said = (("user", "q"), ("assistant", "x</think>y"), ("user", "o"), ("assistant", "z"))
    messages = [{"role": role, "content": content} for role, content in said]
    with pytest.raises(InputError, match="turn 3 or earlier ones later on .some drop <think>"):
        conversation_ids(messages, Drops(), 0)


def test_a_token_that_holds_a_delimiter_ends_a_step():
    class Tokens:
        texts = ["a", "\n", ".\n\n", "b", "\n  "]

        def __len__(self):
            return 5

        def batch_decode(self, rows):
            return [self.texts[i] for [i] in rows]

    ends = step_ids(Tokens(), ("\n",))
    assert ends == {1, 2, 4}
    assert step_starts([0, 2, 3, 1, 1, 0], ends) == [True, False, True, False, True, True]
    assert step_ids(Tokens(), ("b",)) == {3} and step_ids(Tokens(), ("b", "\n")) == {1, 2, 3, 4}
    for wrong in ("\\n", "d", ""):
        Tokens.texts[0] = wrong if wrong != "d" else "c"  # also a tokenizer that has such a token
        with pytest.raises(InputError, match="--step_delimiters .*for a newline write [$]'\\\\n' in the shell"):
            step_ids(Tokens(), ("b", wrong))  # each must be in a token: ". " is in none of most tokenizers


# --------------------------------------------------------------------------- comparisons, selection, search


@pytest.mark.parametrize("case", VECTORS["answer_extraction_cases"], ids=lambda c: c["text"][:12] or "empty")
def test_the_default_verifier_reads_the_answers_that_the_published_extraction_reads(case):
    golds = ["18", "0.5", "1234.50", "5%"]
    rewards = [v.reward for v in grade([case["text"]] * 4, golds, verifier=Args().verifier)]
    assert rewards == [float(gold == case["gsm8k_last_single"]) for gold in golds]


def test_dpo_is_the_logistic_loss_of_the_margin():
    loss = oreo.dpo_loss(f64([-1.0 + 1.5, 0]), f64([-2.0 + 1.0, 0]), beta=0.1)
    assert_equal(loss, [math.log1p(math.exp(-0.15)), math.log(2)])


def test_kto_is_half_at_its_baseline_and_falls_as_right_answers_gain_and_wrong_ones_lose():
    right = torch.tensor([True, False, True, False])
    loss = oreo.kto_loss(f64([2.0, 2.0, 3.0, 3.0]), right, 2.0, beta=0.5)
    assert_equal(loss, [0.5, 0.5, 1 / (1 + math.exp(0.5)), 1 / (1 + math.exp(-0.5))])


class Given(torch.nn.Module):
    """A model whose log-probs are given, [N]."""

    def __init__(self, logp):
        super().__init__()
        self.logp = torch.nn.Parameter(logp)

    def forward(self, batch):
        return self.logp


@pytest.mark.parametrize("stage", ["dpo", "kto"])
def test_the_log_ratio_of_a_long_answer_is_exact_beside_its_log_probs(stage, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    ref = -3 * torch.rand(4096, generator=generator)
    logp = ref + 1e-4 * torch.rand(4096, generator=generator)
    rows = [Row([0], [1] * 2048, [True] * 2048, [True] * 2048, reward, index=i) for i, reward in enumerate((1.0, 0.0))]
    monkeypatch.setattr(oreo, "kto_baseline", lambda *_: 0.0)
    args = Args(stage=stage, micro_batch_tokens=10_000)
    units = [rows] if stage == "dpo" else [[row] for row in rows]
    accumulate_gradient(Given(logp), None, Given(ref), units, args, ONE_RANK)
    exact = (logp.double() - ref.double()).view(2, 2048).sum(1)
    assert [row.log_ratio for row in rows] == pytest.approx(exact.tolist(), rel=1e-5)
    seen = []
    monkeypatch.setattr(oreo, "dpo_loss", lambda chosen, rejected, **_: seen.append([chosen, rejected]) or chosen)
    monkeypatch.setattr(oreo, "kto_loss", lambda ratios, *_, **__: seen.append(ratios) or ratios)
    accumulate_gradient(Given(logp), None, Given(ref), units, args, ONE_RANK)
    assert [ratio.item() for ratio in seen[0]] == pytest.approx(exact.tolist(), rel=1e-5)


def test_pairs_are_right_and_wrong_answers_to_one_question_each_at_most_once():
    mask = [True]
    rows = [Row([0], [i], mask, mask, float(i % 2), i // 5) for i in range(15)]
    pairs = oreo.dpo_pairs(rows, 4, seed=0)
    assert len(pairs) == 12
    assert all(a.reward == 1 and b.reward == 0 and a.group == b.group for a, b in pairs)
    assert len({(a.response[0], b.response[0]) for a, b in pairs}) == 12
    assert len(oreo.dpo_pairs(rows, 100, seed=0)) == 18


def test_the_beam_keeps_the_published_candidates():
    case = VECTORS["beam_cases"][0]
    for states, values, kept, answers in zip(
        case["inputs"]["next_states"], case["inputs"]["values"],
        case["outputs"]["kept_states"], case["outputs"]["answers"], strict=True,
    ):
        going, done = select_beam(values, [s["stop_reason"] is None for s in states], case["flags"]["K"])
        assert [states[i]["text"] + states[i]["stop_reason"] for i in going] == kept
        assert [states[i] for i in done] == answers


def search_tree(width, *, candidates, max_steps=10, compete=False, ends=3):
    """Questions whose steps are digits 0 .. candidates-1, worth their sum; an answer has `ends` steps."""
    asked = []

    def sample(states, step):
        asked.append(len(states))
        longer = [[[*c.response, k] for k in range(candidates)] for _, c in states]
        return [[Candidate(response, len(response) == ends) for response in group] for group in longer]

    def score(states):
        return [float(sum(c.response)) for _, c in states]

    return beam_search(2, sample, score, width=width, max_steps=max_steps, compete=compete), asked


def test_beam_search_keeps_width_states_and_pools_the_answers():
    answers, asked = search_tree(2, candidates=3)
    assert asked == [2, 4, 4]  # two questions: one state each, then two each
    for found in answers:
        assert len(found) == 6 and max(found, key=lambda c: c.value).response == [2, 2, 2]


def test_states_of_negative_values_are_ranked_too():
    beams = []

    def sample(states, step):
        beams.append([c.response for _, c in states])
        return [[Candidate([*c.response, k], step == 1) for k in range(3)] for _, c in states]

    [answers] = beam_search(1, sample, lambda states: [-9.0 + c.response[-1] for _, c in states], width=1, max_steps=2)
    assert beams == [[[]], [[2]]] and [c.value for c in answers] == [-9.0, -8.0, -7.0]


def test_what_does_not_end_in_max_steps_is_no_answer():
    answers, asked = search_tree(2, candidates=3, max_steps=2)
    assert answers == [[], []] and asked == [2, 4]


def test_best_of_k_takes_the_best_step_each_time_and_best_of_n_the_best_answer():
    answers, asked = search_tree(1, candidates=4, compete=True)
    assert asked == [2, 2, 2] and [[c.response for c in found] for found in answers] == [[[3, 3, 3]]] * 2
    answers, asked = search_tree(4, candidates=4, max_steps=1, ends=1)
    assert asked == [2] and all(len(found) == 4 for found in answers)


def test_rows_on_a_grid_are_right_padded_and_keep_their_gradient():
    x = torch.arange(1.0, 7.0, requires_grad=True)
    grid = oreo.on_grid(x, [2, 1, 3])
    assert grid.tolist() == [[1, 2, 0], [3, 0, 0], [4, 5, 6]]
    (grid * torch.tensor([[1.0], [10], [100]])).sum().backward()
    assert x.grad.tolist() == [1, 1, 10, 100, 100, 100]
    assert oreo.on_grid(x[:0], []).shape == (0, 1)


def test_row_losses_of_an_empty_batch_are_empty():
    empty = torch.zeros(0, 1)
    assert [x.shape for x in oreo_row_losses(*[empty] * 5, torch.zeros(0), beta=0.1)] == [(0,), (0,)]


def test_seeds_draw_other_pairs_of_a_question():
    rows = [Row([0], [i], [True], [True], float(i % 2), 0) for i in range(12)]
    drawn = {tuple(a.response[0] for a, _ in oreo.dpo_pairs(rows, 4, seed)) for seed in range(4)}
    assert len(drawn) > 1


def test_the_last_value_is_that_of_the_text_before_the_last_token():
    row = Row([0], [5, 6, 1], [True] * 3, [True, False, True])
    fields = oreo.measurements(row, torch.zeros(3), torch.tensor([1.0, 2.0, 3.0]))
    assert (fields["values"], fields["last_value"]) == ([1.0, 3.0], 3.0)


def test_an_answer_of_a_low_value_takes_the_place_of_no_better_state():
    assert select_beam([0.9, 0.1, 0.7], [False, True, False], 2, compete=True) == ([0, 2], [])
