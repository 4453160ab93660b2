"""Random calls: what is called, with which tensors, in which dtype, layout, size and magnitude."""

import random
from dataclasses import dataclass, field

import fuzz_oracle as oracle
import torch

import fastcl
from fastcl import MochiDraws, NegativeQueue, PairRule, testing

CALLS = {"info_nce": 6, "nt_xent": 3, "clip_loss": 3, "sup_con": 5, "mochi_loss": 2, "stats": 6, "topk": 3}
EXPONENTS = {torch.float16: (-3, -1, 0, 0, 0, 1, 2)}
WIDE = (-20, -13, -8, -3, 0, 0, 0, 0, 0, 3, 8, 15, 20)
UNNORMALIZED = (-8, -3, 0, 0, 0, 0, 3, 8)
LOGITS = (1e-2, 1.0, 10.0, 100.0, 1e4, 1e5, 1e7)
SIZES = (1, 1, 2, 2, 3, 4, 5, 7, 8, 9, 13, 16, 17, 31, 33)
WIDTHS = (1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 64, 65, 100)
LARGE_WIDTHS = (255, 512, 1024, 1031, 4096, 16_384)


@dataclass
class Fuzzed:
    """One call: ``tensors`` may need gradients (those named in ``wanted``), ``options`` never do."""

    call: str
    backend: str
    dtype: torch.dtype
    kind: str
    tensors: dict
    options: dict = field(default_factory=dict)
    numbers: dict = field(default_factory=dict)  # a scalar given as a Python number
    wanted: list = field(default_factory=list)
    normalized: bool = True
    seed: int = 0

    def __str__(self):
        every = {**self.tensors, **{k: v for k, v in self.options.items() if isinstance(v, torch.Tensor)}}
        if "queue" in self.options:
            queue = self.options["queue"]
            every |= {f"{queue.keys.dtype} keys": queue.keys, "ids": queue.ids}
        shapes = {k: (tuple(v.shape), v.stride(), v.storage_offset()) for k, v in every.items()}
        shown = {k: v for k, v in self.options.items() if isinstance(v, (str, int, float, bool, type(None)))}
        named = f"{self.call} {self.backend} {self.dtype} {self.kind}"
        return f"{named} {shapes} {shown} {self.numbers} {self.wanted}"


class Source:
    """Everything random in a case."""

    def __init__(self, seed, number):
        self.pick = random.Random(f"{seed}/{number}")
        self.torch = torch.Generator().manual_seed(self.pick.getrandbits(60))

    def chance(self, p):
        return self.pick.random() < p

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.torch, dtype=torch.float64)

    def integers(self, values, count):
        return torch.tensor(values)[torch.randint(len(values), (count,), generator=self.torch)]

    def layout(self, x):
        """The same values, stored otherwise."""
        name = self.pick.choice(("plain", "plain", "transposed", "components", "rows", "offset", "wide"))
        if not x.dim() or name == "plain":
            return x
        if name == "transposed" and x.dim() > 1:
            return x.transpose(0, -1).contiguous().transpose(0, -1)
        if name == "rows":
            return x.repeat_interleave(2, 0)[::2]
        if name == "components":
            return x.repeat_interleave(3, -1)[..., ::3]
        if name == "wide":
            return torch.cat([x, x, x], -1)[..., x.shape[-1] : 2 * x.shape[-1]]
        storage = torch.cat([x.new_zeros(1), x.flatten()])
        return storage[1:].view(x.shape)


def _ids(source, count):
    pools = ([0, 1], [-1, 3, 3 + (1 << 32), -(1 << 62)], list(range(max(count, 1))))
    ids = source.integers(source.pick.choice(pools), count)
    narrow = ids.abs().max() < 100 if count else False
    return source.layout(ids.to(torch.int32) if narrow and source.chance(0.2) else ids)


class Maker:
    """The tensors of one case, alike in dtype, kind and magnitude."""

    def __init__(self, source, dtype, normalized):
        pick = source.pick
        self.source, self.dtype, self.normalized = source, dtype, normalized
        self.kind = pick.choice(
            ("random", "random", "peaked", "converged", "equal", "collapsed", "duplicates", "positive")
        )
        self.width = pick.choice(WIDTHS)
        self.sizes = SIZES if source.chance(0.98) else (64, 65, 130, 257)
        if source.chance(0.06):
            self.width, self.sizes = pick.choice(LARGE_WIDTHS), SIZES[:9]
        if source.chance(0.02):
            self.sizes = (0, 1, 2)
        choices = EXPONENTS.get(dtype, WIDE if normalized else UNNORMALIZED)
        self.exponents = choices if normalized and source.chance(0.2) else [pick.choice(choices)]
        self.anchor = None

    def size(self, least=0):
        return max(self.source.pick.choice(self.sizes), least)

    def rows(self, count):
        """Rows in the dtype under test; later ones are near the first where the kind says so."""
        source, kind = self.source, self.kind
        x = source.normal(count, self.width)
        if kind == "positive":
            x = x.abs()
        if self.anchor is None:
            self.anchor = x if count else source.normal(1, self.width)
        like = self.anchor[torch.arange(count) % len(self.anchor)]
        if kind == "collapsed":
            x = self.anchor[:1].repeat(count, 1)
        elif kind == "duplicates":
            x = self.anchor[torch.arange(count) * 7 % min(3, len(self.anchor))]
        elif kind in ("peaked", "converged", "equal"):
            x = like + {"peaked": 0.1, "converged": 1e-3, "equal": 0.0}[kind] * x
        return self.scaled(x)

    def scaled(self, x):
        exponents = self.source.integers(self.exponents, len(x)).double()
        x = x * (10.0**exponents).reshape(-1, *[1] * (x.dim() - 1))
        if self.source.chance(0.05) and len(x):
            x[self.source.pick.randrange(len(x))] = 0.0
        return self.source.layout(x.to(self.dtype))


def make(seed, number, backends):
    """The case of that number, the same every time."""
    source = Source(seed, number)
    pick = source.pick
    call = pick.choices(list(CALLS), list(CALLS.values()))[0]
    dtype = pick.choice((torch.float64, torch.float32, torch.float32, torch.bfloat16, torch.float16))
    normalized = call not in ("clip_loss", "sup_con", "stats", "topk") or source.chance(0.6)
    maker = Maker(source, dtype, normalized)
    case = Fuzzed(call, pick.choice(backends), dtype, maker.kind, {}, normalized=normalized)
    case.seed = pick.getrandbits(30)
    if call not in ("stats", "topk"):
        case.options["reduction"] = pick.choice(("none", "mean", "sum"))
    _FILL[call](case, maker)
    names = list(case.tensors)
    case.wanted = names if source.chance(0.6) else [n for n in names if source.chance(0.5)]
    return case


def _factor(case, maker, name, inverse):
    """A temperature or a scale, as a number or as a 0-d tensor of any dtype."""
    source = maker.source
    if case.normalized:
        logit = 10 ** source.pick.uniform(-1, 3) if source.chance(0.95) else source.pick.choice(LOGITS)
    else:
        largest = 1.0
        for key, x in case.tensors.items():
            if key not in ("key_bias", "key_scale"):
                largest *= x.double().norm(dim=-1).max().item() if x.numel() else 1.0
        if len(case.tensors) == 1 or ("key" not in case.tensors and "text_features" not in case.tensors):
            largest *= largest
        logit = source.pick.choice(LOGITS) / max(largest, 1e-30)
    value = source.pick.choice((1, 1, 1, -1)) * (1 / logit if inverse else logit)
    if source.chance(0.5):
        half = 1e-3 < abs(value) < 1e3 and source.chance(0.3)
        dtype = torch.float16 if half else source.pick.choice((torch.float64, torch.float32, torch.bfloat16))
        case.tensors[name] = torch.tensor(value, dtype=dtype)
    else:
        case.numbers[name] = value


def _queue(case, maker, size):
    keys = maker.source.normal(size, maker.width)
    if maker.kind in ("collapsed", "duplicates"):
        keys = keys[torch.arange(size) % min(size, 3)]
    if maker.kind in ("equal", "peaked") and maker.anchor is not None and maker.source.chance(0.5):
        keys = maker.anchor[torch.arange(size) % len(maker.anchor)] + 0.1 * keys
    dtype = maker.source.pick.choice((torch.float32, torch.float16, torch.bfloat16))
    keys = oracle.unit(keys).to(dtype)
    queue = NegativeQueue(size, maker.width, dtype=dtype, with_ids=True)
    queue.keys, queue.ids = maker.source.layout(keys), maker.source.layout(_ids(maker.source, size).long())
    case.options["queue"] = queue


def _fill_info_nce(case, maker):
    n = maker.size()
    case.tensors.update(query=maker.rows(n), positive_key=maker.rows(n))
    form = maker.source.pick.choice(("batch", "unpaired", "paired", "queue"))
    case.options["form"] = form
    if form == "unpaired":
        case.tensors["negative_keys"] = maker.rows(maker.size())
    elif form == "paired":
        count = maker.size(1)
        flat = maker.source.normal(n, count, maker.width)
        if maker.kind in ("equal", "collapsed"):
            flat = maker.anchor[torch.arange(n) % len(maker.anchor)][:, None].repeat(1, count, 1)
        case.tensors["negative_keys"] = maker.scaled(flat)
    elif form == "queue":
        _queue(case, maker, maker.size(1))
        case.options["query_ids"] = _ids(maker.source, n) if maker.source.chance(0.5) else None
    _factor(case, maker, "temperature", inverse=True)


def _fill_nt_xent(case, maker):
    n = maker.size()
    case.tensors.update(z1=maker.rows(n), z2=maker.rows(n))
    _factor(case, maker, "temperature", inverse=True)


def _fill_clip_loss(case, maker):
    n = maker.size()
    case.tensors.update(image_features=maker.rows(n), text_features=maker.rows(n))
    case.options["normalize"] = case.normalized
    _factor(case, maker, "logit_scale", inverse=False)


def _fill_sup_con(case, maker):
    source, n = maker.source, maker.size()
    views = source.pick.choice((0, 1, 2, 2, 3))
    if views:
        features = torch.stack([maker.rows(n) for _ in range(views)], 1)
        case.tensors["features"] = source.layout(features)
    else:
        case.tensors["features"] = maker.rows(n)
    given = source.pick.choice(("labels", "labels", "mask", "none" if views else "labels"))
    mask = torch.rand(n, n, generator=source.torch) < source.pick.choice((0.1, 0.5, 1.0))
    case.options.update(
        labels=_ids(source, n) if given == "labels" else None,
        mask=source.layout(mask) if given == "mask" else None,
        variant=source.pick.choice(("out", "in")),
        contrast_mode=source.pick.choice(("all", "one")),
        normalize=case.normalized,
        base_temperature=source.pick.choice((None, None, 0.07)),
    )
    _factor(case, maker, "temperature", inverse=True)


def _fill_mochi_loss(case, maker):
    source, n = maker.source, maker.size()
    case.tensors.update(query=maker.rows(n), positive_key=maker.rows(n))
    size = maker.size(1)
    _queue(case, maker, size)
    n_hard = source.pick.randint(1, size)
    counts = source.pick.choice(((3, 2), (1, 0), (0, 1), (17, 9), (5, 5)))
    ranks = [torch.randint(n_hard, (n, c), generator=source.torch) for c in (counts[0], *counts)]
    alpha, beta = (torch.rand(n, c, generator=source.torch) for c in counts)
    draws = ranks[0], ranks[1], alpha, ranks[2], beta / 2
    case.options.update(draws=MochiDraws(*map(source.layout, draws)), n_hard=n_hard, order=None)
    case.options.update(n_mix=counts[0], n_query_mix=counts[1])
    _factor(case, maker, "temperature", inverse=True)


def _fill_stats(case, maker):
    source, n = maker.source, maker.size()
    case.tensors["query"] = maker.rows(n)
    symmetric = source.chance(0.3)
    m = n if symmetric else maker.size()
    if not symmetric:
        case.tensors["key"] = maker.rows(m)
    for name in ("positive", "exclude"):
        ids = (own := _ids(source, n), own if symmetric else _ids(source, m))
        case.options[name] = ids if source.chance(0.5) else None
    _factor(case, maker, "scale", inverse=False)
    if source.chance(0.3):
        bias = source.normal(m) * source.pick.choice((1, 100))
        case.tensors["key_bias"] = source.layout(bias.to(case.dtype))
    if source.chance(0.3):
        case.tensors["key_scale"] = source.layout(
            (0.5 + torch.rand(m, generator=source.torch)).to(case.dtype)
        )
    case.options.update(columns=source.chance(0.5), normalize=case.normalized)


def _fill_topk(case, maker):
    n, m = maker.size(), maker.size(1)
    case.tensors.update(query=maker.rows(n), key=maker.rows(m))
    exclude = (_ids(maker.source, n), _ids(maker.source, m)) if maker.source.chance(0.5) else None
    case.options.update(k=maker.source.pick.choice((1, 2, m, m + 3)), exclude=exclude)
    case.options["normalize"] = case.normalized


_FILL = {
    "info_nce": _fill_info_nce,
    "nt_xent": _fill_nt_xent,
    "clip_loss": _fill_clip_loss,
    "sup_con": _fill_sup_con,
    "mochi_loss": _fill_mochi_loss,
    "stats": _fill_stats,
    "topk": _fill_topk,
}


def _leaves(case, x):
    scalars = {**case.numbers, **x}
    return scalars, {k: v for k, v in case.options.items() if k in ("reduction", "normalize")}


def product(case, x):
    """What fastcl returns, as a list of tensors."""
    x, plain = _leaves(case, x)
    o = case.options
    if case.call == "info_nce":
        if o["form"] == "queue":
            return [fastcl.info_nce(**x, negative_keys=o["queue"], query_ids=o["query_ids"], **plain)]
        mode = "paired" if o["form"] == "paired" else "unpaired"
        return [fastcl.info_nce(**x, negative_mode=mode, **plain)]
    if case.call == "mochi_loss":
        sizes = {k: o[k] for k in ("n_hard", "n_mix", "n_query_mix", "draws")}
        return [fastcl.mochi_loss(**x, queue=o["queue"], **sizes, **plain)]
    if case.call == "sup_con":
        return [fastcl.sup_con(**x, **o)]
    if case.call == "stats":
        x.setdefault("key", x["query"])
        rule = PairRule(positive=o["positive"], exclude=o["exclude"])
        return testing.every_statistic(
            fastcl.similarity_stats(**x, rule=rule, columns=o["columns"], **plain), oracle.STATISTICS
        )
    return [getattr(fastcl, case.call)(**x, **plain)]


def exact(case, x, dtype=torch.float64):
    """The oracle's answer."""
    scalars = {k: torch.tensor(v, dtype=dtype) for k, v in case.numbers.items()}
    o = case.options
    if "queue" in o:
        x = {**x, "keys": o["queue"].keys.to(dtype)}
        o = {**o, "key_ids": o["queue"].ids}
    result = getattr(oracle, "similarity_stats" if case.call == "stats" else case.call)({**x, **scalars}, o)
    if "order" in o:
        case.options["order"] = o["order"]
    return result


def dense(case, x):
    """What plain PyTorch returns in the dtype of ``x``."""
    if "queue" in case.options:
        return list(exact(case, x, case.dtype).outputs)
    o = dict(case.options)
    x, plain = _leaves(case, x)
    if case.call == "info_nce":
        mode = "paired" if o["form"] == "paired" else "unpaired"
        return [testing.dense_info_nce(**x, negative_mode=mode, **plain)]
    if case.call == "sup_con":
        base = o.pop("base_temperature")
        loss = testing.dense_sup_con(**x, **o)
        return [loss if base is None else loss * x["temperature"] / base]
    if case.call == "stats":
        x.setdefault("key", x["query"])
        rule = PairRule(positive=o["positive"], exclude=o["exclude"])
        stats = testing.dense_stats(**x, rule=rule, columns=o["columns"], **plain)
        return testing.every_statistic(stats, oracle.STATISTICS)
    return [getattr(testing, f"dense_{case.call}")(**x, **plain)]
