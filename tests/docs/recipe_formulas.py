"""The papers' formulas of the pages under docs/methods, written without regard to cost."""

from itertools import combinations

import torch
import torch.nn.functional as F
from pages import functions_of
from torch import nn

import fastcl
from fastcl import testing

N, D = 7, 5
LABELS = torch.tensor([2, 0, 1, 1, 0, 3, 4])


def queue(with_ids=True):
    made = fastcl.NegativeQueue(11, D, with_ids=with_ids)
    made.keys.copy_(F.normalize(torch.randn(11, D, generator=testing.generator(7)), dim=1))
    if with_ids:
        made.ids.copy_(torch.arange(11) % 6 - 1)
    return made


def cosines(x, y):
    return (x / x.norm(dim=1, keepdim=True)) @ (y / y.norm(dim=1, keepdim=True)).T


def cross_entropy(logits, target=None):
    """The mean of ``-log softmax`` at ``target``, by default the diagonal."""
    target = torch.arange(len(logits)) if target is None else target
    return -(logits.exp() / logits.exp().sum(1, keepdim=True))[torch.arange(len(logits)), target].log().mean()


def others(table):
    return ~torch.eye(len(table), dtype=torch.bool)


def cmc(*views):
    total = 0
    for a, b in combinations(views, 2):
        total = total + cross_entropy(cosines(a, b) / 0.07) + cross_entropy(cosines(b, a) / 0.07)
    return total


def pirl(image, patches, memory):
    bank = queue()
    total = 0
    for query in (patches, image):
        own = (cosines(query, memory).diag() / 0.07).exp()
        # the queue's rows are used as they are stored
        rest = (F.normalize(query) @ bank.keys.double().T / 0.07).exp() * (LABELS[:, None] != bank.ids)
        total = total - 0.5 * (own / (own + rest.sum(1))).log().mean()
    return total


def graphcl(z1, z2):
    table = (cosines(z1, z2) / 0.5).exp()
    return -(table.diag() / (table * others(table)).sum(1)).log().mean()


def invaspread(z, augmented):
    taken = (cosines(z, z) / 0.1).exp()
    probability = taken / taken.sum(0)  # of image i, given image j
    spread = -(1 - probability)[others(taken)].log().sum() / len(z)
    return cross_entropy(cosines(augmented, z) / 0.1) + spread


def moco_v3(q1, q2, k1, k2):
    k1, k2 = k1.detach(), k2.detach()
    return 0.4 * (cross_entropy(cosines(q1, k2) / 0.2) + cross_entropy(cosines(q2, k1) / 0.2))


def simcse(premise, entailment, contradiction):
    return cross_entropy(torch.cat([cosines(premise, entailment), cosines(premise, contradiction)], 1) / 0.05)


def n_pair(anchor, positive):
    each = []
    for i in range(len(anchor)):
        apart = [anchor[i] @ positive[j] - anchor[i] @ positive[i] for j in range(len(anchor)) if j != i]
        each.append((1 + torch.stack(apart).exp().sum()).log())
    lengths = anchor.norm(dim=1) ** 2 + positive.norm(dim=1) ** 2
    return torch.stack(each).mean() + 0.002 * lengths.mean()


def simsiam(p1, p2, z1, z2):
    return -(cosines(p1, z2.detach()).diag().mean() + cosines(p2, z1.detach()).diag().mean()) / 2


def maps():
    torch.manual_seed(3)
    return [nn.Linear(D, D, bias=False).double() for _ in range(2)]


def sequences(x):
    """(2, 7, D): a batch of two sequences of seven times."""
    return torch.stack([x, x.flip(0) * 0.7 + 0.1])


def cpc(context, latents):
    context, latents = sequences(context), sequences(latents)
    each = []
    for k, step in enumerate(maps(), 1):
        predicted = torch.cat([row[:-k] @ step.weight.T for row in context])
        each.append(cross_entropy(predicted @ torch.cat([row[k:] for row in latents]).T))
    return sum(each) / len(each)


def cross_batch_memory(z):
    past = queue()
    keys, key_labels = torch.cat([z, past.keys.double()]), torch.cat([LABELS, past.ids])
    logits, losses = cosines(z, keys) / 0.1, []
    for i in range(len(z)):
        takes_part = torch.arange(len(keys)) != i
        positive = takes_part & (key_labels == LABELS[i])
        log_probability = logits[i] - logits[i][takes_part].exp().sum().log()
        losses.append(-log_probability[positive].mean() if positive.any() else 0 * logits[i].sum())
    return torch.stack(losses).mean()


def bank():
    """A row for each of eleven images; the batch is images 3 to 9."""
    made = fastcl.MemoryBank(11, D, dtype=torch.float64)
    made.keys.copy_(F.normalize(queue().keys.double()))
    return made


IMAGES = torch.arange(3, 3 + N)
NOISE = torch.arange(N * 4).reshape(N, 4) * 5 % 11


def inst_disc(z):
    keys, z = bank().keys, F.normalize(z)
    total = 0
    for i in range(N):
        density = (keys @ z[i] / 0.07).exp() / torch.tensor(8.0, dtype=torch.float64).exp()
        of_data = density / (density + 4 / 11)  # four noise rows, each drawn with probability 1/11
        total = total - of_data[IMAGES[i]].log() - (1 - of_data[NOISE[i]]).log().sum()
        total = total + 0.3 * (z[i] - keys[IMAGES[i]]).square().sum()
    return total / N


def deepcluster(z, weight, bias):
    logits, sizes = z @ weight.T + bias[:, 0], LABELS.bincount()
    each = torch.stack([cross_entropy(logits[i : i + 1], LABELS[i : i + 1]) for i in range(N)])
    return (each / sizes[LABELS]).sum() / (1 / sizes[LABELS]).sum()


def clusterings():
    features = torch.randn(11, D, generator=testing.generator(5), dtype=torch.float64)
    cluster = functions_of("pcl")["cluster"]
    return [cluster(features, k, torch.Generator().manual_seed(k)) for k in (3, 4)]


def pcl(query, key):
    keys = queue().keys.double()
    own = cosines(query, key).diag()[:, None] / 0.2
    total = cross_entropy(torch.cat([own, F.normalize(query) @ keys.T / 0.2], 1), torch.zeros(N).long())
    for prototypes, assigned, phi in clusterings():
        total = total + cross_entropy(cosines(query, prototypes) / phi, assigned[IMAGES]) / 2
    return total


CLUSTERS = torch.tensor([0, 0, 1, 2, 2, 1, 3, 4, 4, 0, 5])


def spcl(z):
    keys = bank().keys
    centroids = torch.stack([keys[c == CLUSTERS].mean(0) for c in range(6)])
    return cross_entropy(F.normalize(z) @ centroids.T / 0.05, CLUSTERS[IMAGES])


def levels():
    keep = functions_of("hcsc")["keep"]
    return [keep(queue().keys.double(), c, a[IMAGES], phi, drawn) for c, a, phi in clusterings()]


def drawn(shape, device=None):
    return torch.rand(shape, generator=testing.generator(2))


def hcsc(query, key):
    keys, total = queue().keys.double(), 0
    for prototypes, assigned, phi in clusterings():
        similar = (keys @ prototypes.T / phi).exp()
        for i in range(N):
            same = similar[:, assigned[IMAGES[i]]] / similar.sum(1)
            kept = drawn((N, 11))[i] >= same
            own = (F.normalize(query[i], dim=0) @ F.normalize(key[i], dim=0) / 0.2).exp()
            rest = (keys[kept] @ F.normalize(query[i], dim=0) / 0.2).exp().sum()
            total = total - (own / (own + rest)).log() / N / 2
    return total


PARTNER, SHARE = torch.tensor([3, 1, 0, 2, 6, 5, 4]), torch.linspace(0, 1, N, dtype=torch.float64)


def i_mix(mixed, key):
    logits = cosines(mixed, key) / 0.2
    each = [
        share * cross_entropy(logits[i : i + 1], torch.tensor([i]))
        + (1 - share) * cross_entropy(logits[i : i + 1], PARTNER[i : i + 1])
        for i, share in enumerate(SHARE)
    ]
    return sum(each) / N


# of each query's class, but the query's own key; the keys are 7 other views and 7 of a queue
DRAWN = torch.tensor([[7, -1], [4, 11], [3, 8], [2, 9], [1, 11], [12, -1], [13, -1]])


def kcl(query, keys, stored):
    logits = cosines(query, torch.cat([keys, stored])) / 0.07
    total = 0
    for i in range(N):
        positives = [i, *(j for j in DRAWN[i].tolist() if j >= 0)]
        total = total - sum((logits[i, j].exp() / logits[i].exp().sum()).log() for j in positives) / len(
            positives
        )
    return total / N


def tsc(query, keys, stored, centres):
    logits = cosines(query, torch.cat([keys, stored, centres[:5]])) / 0.07
    log_p = (logits.exp() / logits.exp().sum(1, keepdim=True)).log()
    total = 0
    for i in range(N):
        positives = [i, *(j for j in DRAWN[i].tolist() if j >= 0)]
        total = total - log_p[i, positives].mean() - 0.4 * log_p[i, 14 + LABELS[i]]
    return total / N


def crops(*views):
    return torch.stack(views)


def soft(target, logits):
    return -(target * (logits.exp() / logits.exp().sum(1, keepdim=True)).log()).sum(1).mean()


CENTRE = torch.linspace(-0.3, 0.4, N, dtype=torch.float64)


def dino(a, b, c, t1, t2, weight, teacher_weight):
    student, terms = (a, b, c), []
    for t, teacher in enumerate((t1, t2)):
        logits = (cosines(teacher, teacher_weight) - CENTRE) / 0.04
        target = (logits.exp() / logits.exp().sum(1, keepdim=True)).detach()
        terms += [soft(target, cosines(x, weight) / 0.1) for v, x in enumerate(student) if v != t]
    return sum(terms) / len(terms)


def swav(a, b, c, prototypes):
    terms = []
    for t, view in enumerate((a, b)):
        q = (cosines(view, prototypes).detach() / 0.05).exp().T  # the paper's loop: prototypes x samples
        q = q / q.sum()
        for _ in range(3):
            q = q / q.sum(1, keepdim=True) / q.shape[0]
            q = q / q.sum(0) / q.shape[1]
        target = (q * q.shape[1]).T
        terms += [soft(target, cosines(x, prototypes) / 0.1) for v, x in enumerate((a, b, c)) if v != t]
    return sum(terms) / len(terms)


def false_negatives(z1, z2, s1, s2):
    z, support, losses = torch.cat([z1, z2]), (s1, s2), []
    for i in range(2 * N):
        others = [j for j in range(2 * N) if j % N != i % N]
        scores = sum(cosines(s, z)[i % N] for s in support) / 2
        false = sorted(others, key=lambda j: -scores[j].item())[:3]
        table = cosines(z[i : i + 1], z)[0] / 0.1
        kept = [j for j in others if j not in false] + [(i + N) % (2 * N)]
        losses.append(-(table[kept[-1]].exp() / table[kept].exp().sum()).log())
    return sum(losses) / len(losses)


def unicl(image, text):
    table, total = cosines(image, text) * 12.0, 0
    for logits in (table, table.T):
        for i in range(N):
            positive = (LABELS[i] == LABELS).nonzero()[:, 0]
            total = total - (logits[i, positive].exp() / logits[i].exp().sum()).log().mean()
    return total / N / 2


def arcface(z, classes, scale=9.0, angle=0.5, margin=0.1):
    cosine = cosines(z, classes)
    logits = scale * cosine
    for i, label in enumerate(LABELS):
        logits[i, label] = scale * ((cosine[i, label].arccos() + angle).cos() - margin)
    return cross_entropy(logits, LABELS)


def queues(count):
    made = [queue(with_ids=False) for _ in range(count)]
    for shift, one in enumerate(made):
        one.keys.copy_(one.keys.roll(shift, 1))
    return made


def looc_spaces(*x):
    """Two augmentations: queries (3, N, D) and keys (3, 3, N, D)."""
    return torch.stack(x[:3]), torch.stack(
        [torch.stack([v.roll(s, 0) + 0.2 * v for v in x[3:]]) for s in range(3)]
    )


def looc(*x):
    q, k = looc_spaces(*x)
    total = 0
    for n in range(N):
        own = torch.stack(
            [
                torch.stack([cosines(q[i, n : n + 1], k[i, j, n : n + 1])[0, 0] for j in range(3)])
                for i in range(3)
            ]
        )
        own = (own / 0.2).exp()
        for i, stored in enumerate(queues(3)):
            rest = (F.normalize(q[i, n], dim=0) @ stored.keys.double().T / 0.2).exp().sum()
            if i == 0:
                total = total - (own[0] / (own[0] + rest)).log().sum()
            else:
                total = total - (own[i, i] / (own[i].sum() + rest)).log()
    return total / 3 / N


def mice_rows(a, b, gate, experts):
    student = torch.stack([F.normalize(a), F.normalize(a.roll(1, 1))])
    teacher = torch.stack([F.normalize(b), F.normalize(b.roll(1, 1))]).detach()
    return student, teacher, gate[:, :2], experts[:2]


def mice(*x):
    """The paper's negative evidence bound, at the posterior of the experts."""
    student, teacher, gate, experts = mice_rows(*x)
    gates = gate.exp() / gate.exp().sum(1, keepdim=True)
    total = 0
    for n in range(N):
        found = []
        for k, stored in enumerate(queues(2)):
            query = student[k, n] + experts[k] / experts[k].norm()
            own, rest = (query @ teacher[k, n]).exp(), (stored.keys.double() @ query).exp().sum()
            found.append(own / (own + rest))
        joint = gates[n] * torch.stack(found)
        posterior = (joint / joint.sum()).detach()
        total = total - (posterior * (joint.log() - posterior.log())).sum()
    return total / N


def contragan(z, classes):
    table = (cosines(z, z) / 0.5).exp()
    own = (cosines(z, classes)[torch.arange(N), LABELS] / 0.5).exp()
    total = 0
    for i in range(N):
        others = torch.arange(N) != i
        same = others & (LABELS[i] == LABELS)
        total = total - ((own[i] + table[i, same].sum()) / (own[i] + table[i, others].sum())).log()
    return total / N
