"""Seconds of a pass and of a token over many devices' keys, by a model of counted messages, and a picture of it.

    python benchmarks/tree_attention_model.py [--measured network.json] [--tau 16=2.2 64=2.6] [--picture F.svg] [--out F.json]

The model knows how often processes meet, what they send, what a message and a byte take on a link, and what a pass takes a process
without the others. tree_attention_network.py compares it with measured seconds of gloo over TCP. Here it goes on to what could not be
measured: 128 GPUs and a million keys, with constants that others published (`LINKS`). So beyond the measured ones its figures are a
calculation, not a result; nothing overlaps in it but the ring's next keys with the attention over the last.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import options, parsed, tell

from eyas.view.pictures import pyplot

# ---- gloo over TCP, as measured ----


def tree_pass(alone: float, layers: int, count: int, size: float, latency: float, rate: float) -> float:
    """Seconds of a pass that takes `alone` without a network and in each layer gathers `size` bytes a process: each sends them to all
    others, who wait for them already."""
    return alone + layers * (latency + (count - 1) * size / rate) + beginning(count, latency)


def ring_pass(rest: float, part: float, layers: int, count: int, size: float, latency: float, rate: float) -> float:
    """The same for a ring that passes on `size` bytes of keys and values of a layer. `part`: attention over one process's keys of a layer;
    `rest`: of a pass without attention."""
    return rest + layers * (part + (count - 1) * max(part, latency + size / rate)) + beginning(count, latency)


def beginning(count: int, latency: float) -> float:
    """The first process tells what pass comes, on along a binary tree; and the first message is asked for once the pass begins."""
    return (math.ceil(math.log2(count)) + 1) * latency


# ---- GPUs, by constants of others ----


@dataclass(frozen=True)
class Link:
    """What joins two devices. Latencies in seconds: of NCCL's protocol for small messages (LL) and of that for large ones (Simple)."""

    small: float
    large: float
    rate: float  # bytes a second that a device sends

    def seconds(self, hops: int, size: float, share: float) -> float:
        """So many hops and bytes, by the faster protocol. `share`: how much of the rate LL has."""
        return min(3.6e-6 + hops * self.small + size / (self.rate * share), 8.4e-6 + hops * self.large + size / self.rate)


# Latencies: NCCL's own, src/graph/tuning.cc at 01afd20 (`baseLat`, `hwLat`; LL has a third of the rate, over nodes a quarter, and 1.8 times
# its latency within them). Rates: NCCL's src/graph/topo.h at 069a3d4 for NVLink of Hopper (18 links of 20.6 GB/s) and PCIe (12 GB/s for
# generation 3, so 24 for 4); InfiniBand NDR is 400 Gb/s a port, one for each GPU, as NVIDIA sells it in DGX H100. For many sends at once
# NCCL has no constants: they are taken as one hop.
LINKS = {"NVLink": Link(0.47e-6, 3.4e-6, 18 * 20.6e9), "PCIe": Link(1.0e-6, 5.7e-6, 24e9), "InfiniBand": Link(2.7e-6, 9.6e-6, 50e9)}


@dataclass(frozen=True)
class Network:
    """Nodes of `node` devices: a link within, one between."""

    within: Link
    between: Link
    node: int = 8

    def gather(self, count: int, size: float) -> float:
        """An all-gather of `size` bytes a device, as NCCL does it: in a ring."""
        if count <= self.node:
            return self.within.seconds(count - 1, (count - 1) * size, 1 / 3) if count > 1 else 0.0
        nodes = count // self.node
        slow, fast = self.between, self.within
        small = 3.6e-6 + (count - nodes) * 1.8 * fast.small + (nodes - 1) * slow.small + 4 * (count - 1) * size / slow.rate
        return min(small, 8.4e-6 + (count - nodes) * fast.large + (nodes - 1) * slow.large + (count - 1) * size / slow.rate)

    def exchange(self, count: int, size: float) -> float:
        """Every device sends `size` bytes in equal parts to all, at once: one hop."""
        link = self.within if count <= self.node else self.between
        return link.seconds(1, size * (count - 1) / count, 1 / 4)

    def scattered(self, count: int, size: float) -> float:
        """Each device joins a share of the rows: an exchange, then a gather of the shares."""
        return self.exchange(count, size) + self.gather(count, size / count) if count > 1 else 0.0

    def two_level(self, count: int, size: float) -> float:
        """Within the node, then between the nodes' equal ranks, each with its share of the rows, then within the node again."""
        if count <= self.node:
            return self.scattered(count, size)
        nodes, share = count // self.node, size / self.node
        within = self.within.seconds(1, size, 1 / 4) + self.gather(self.node, share)
        return within + self.between.seconds(nodes - 1, (nodes - 1) * share, 1 / 4)

    def turn(self, count: int, size: float) -> float:
        """A ring's: `size` bytes to the next device."""
        return (self.within if count <= self.node else self.between).seconds(1, size, 1 / 4)


NETWORKS = {
    "NVLink, 8 to a node, InfiniBand between": Network(LINKS["NVLink"], LINKS["InfiniBand"]),
    "PCIe in one machine": Network(LINKS["PCIe"], LINKS["InfiniBand"]),
}


@dataclass(frozen=True)
class Device:
    """A target of Llama 3.1 8B's shape in bfloat16 on one card: seconds of a pass by its rows without keys to speak of, and the bytes a
    second at which keys are read. Passes: measured, results/2026-11-26-gpu (H200, captured, 256 tokens). Keys: at the share of that
    card's 4.8 TB/s (NVIDIA's data sheet) that its dense products reached there: 15 GB of weights in 4.0 ms."""

    layers: int = 32
    heads: int = 32
    kv_heads: int = 8
    width: int = 128
    reading: float = 15.0e9 / 4.0e-3
    passes: tuple[tuple[int, float], ...] = ((1, 5.9e-3), (16, 6.4e-3), (64, 6.8e-3))

    def alone(self, rows: int, keys: float) -> float:
        return dict(self.passes)[rows] + keys * self.layers * self.bytes_of_keys / self.reading

    @property
    def bytes_of_keys(self) -> int:
        """Of one position in one layer."""
        return 2 * 2 * self.kv_heads * self.width

    def state(self, rows: int) -> float:
        """Bytes of a layer's states of so many rows, as one subtree."""
        return 4.0 * rows * self.heads * (self.width + 1)


SCHEDULES = {"gather": Network.gather, "scatter": Network.scattered, "two-level": Network.two_level}


def gpu_token(device: Device, network: Network, count: int, keys: int, rows: int, tau: float) -> dict[str, float]:
    """Seconds a token by each schedule, and as a ring, with trees of so many rows of which `tau` tokens come."""
    alone, share = device.alone(rows, keys / count), keys / count * device.bytes_of_keys
    found = {name: (alone + device.layers * seconds(network, count, device.state(rows))) / tau for name, seconds in SCHEDULES.items()}
    part, products = share / device.reading, dict(device.passes)[rows]
    turn = max(part, network.turn(count, share)) if count > 1 else 0.0
    return found | {"ring": (products + device.layers * (part + (count - 1) * turn)) / tau}


def table(taus: Mapping[int, float], keys: int, counts: Sequence[int]) -> list[dict[str, Any]]:
    """A line for each network, number of devices and tree: milliseconds a token."""
    found = []
    for name, network in NETWORKS.items():
        for count in counts:
            if name.startswith("PCIe") and count > network.node:
                continue
            for rows, tau in {1: 1.0, **taus}.items():
                seconds = gpu_token(Device(), network, count, keys, rows, tau)
                line = {"network": name, "devices": count, "keys": keys, "rows": rows, "tau": tau}
                found.append(line | {f"{way}_ms": round(1e3 * each, 3) for way, each in seconds.items()})
    return found


# ---- the picture ----


def draw(found: Sequence[Mapping[str, Any]], measured: Sequence[Mapping[str, Any]], path: Path) -> None:
    """For each network the milliseconds a token over devices that the model gives; before them measured ones over the model's, if any."""
    plt = pyplot()
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "eyas", "font.size": 9})
    figure, panels = plt.subplots(1, len(NETWORKS) + bool(measured), figsize=(5 * (len(NETWORKS) + bool(measured)), 4))
    for axes, name in zip(panels[::-1], list(NETWORKS)[::-1], strict=False):
        draw_calculated(axes, [each for each in found if each["network"] == name])
        axes.set_title(name)
    if measured:
        draw_measured(panels[0], measured)
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def draw_calculated(axes: Any, lines: Sequence[Mapping[str, Any]]) -> None:
    """The ring without guesses, and the tree by the best schedule, without and with."""
    counts = [each["devices"] for each in lines if each["rows"] == 1]
    ring = [each["ring_ms"] for each in lines if each["rows"] == 1]
    axes.plot(counts, ring, color="tab:orange", marker="o", markersize=3, label="ring")
    for rows, colour in zip(sorted({each["rows"] for each in lines}), ("tab:blue", "tab:green", "tab:red"), strict=False):
        some = [each for each in lines if each["rows"] == rows]
        label = "tree" if rows == 1 else f"tree, {rows} rows a pass, {some[0]['tau']:g} tokens"
        best = [min(each[f"{way}_ms"] for way in SCHEDULES) for each in some]
        axes.plot(counts, best, color=colour, marker="o", markersize=3, label=label)
    axes.set(xscale="log", yscale="log", xlabel="H200s", ylabel="ms a token, calculated")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()


def draw_measured(axes: Any, measured: Sequence[Mapping[str, Any]]) -> None:
    for kind, colour in (("tree", "tab:blue"), ("ring", "tab:orange")):
        points = [(each["model_ms"], each["measured_ms"]) for each in measured if each["kind"] == kind]
        axes.plot(*zip(*points, strict=True), "o", color=colour, markersize=3, alpha=0.7, label=f"{kind}, measured")
    counts = ", ".join(map(str, sorted({each["processes"] for each in measured})))
    title = f"{counts} processes, TCP at a chosen delay"
    ends = [min(each["model_ms"] for each in measured), max(each["model_ms"] for each in measured)]
    axes.plot(ends, ends, color="grey", linewidth=1, label="as the model says")
    axes.fill_between(ends, [0.8 * end for end in ends], [1.2 * end for end in ends], color="grey", alpha=0.15, label="within 20%")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="model, ms a pass",
        ylabel="measured, ms a pass",
        title=title,
    )


def main(words: Sequence[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("--measured", type=Path, help="what tree_attention_network.py found, for the picture's left half")
    parser.add_argument("--tau", nargs="+", default=["16=2", "64=2.5"], help="tokens a round by rows of a tree, ROWS=TAU")
    parser.add_argument("--keys", type=int, default=1 << 20)
    parser.add_argument("--picture", type=Path)
    given = parsed(parser, words)
    taus = {int(rows): float(tau) for rows, tau in (each.split("=") for each in given.tau)}
    found = table(taus, given.keys, [1, 2, 4, 8, 16, 32, 64, 128])
    if given.picture:
        draw(found, json.loads(given.measured.read_text())["rows"] if given.measured else [], given.picture)
    tell(found, given.out)


if __name__ == "__main__":
    main()
