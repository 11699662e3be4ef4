"""A problem as a picture: who owns what, and which number is needed for which."""

from igsm.text import formula_text

LEGEND = {"instance": "#cfe3f5", "abstract": "#fbe0b5", "asked for": "#f3b7b0", "redundant": "#e8e8e8"}


def draw(problem, path):
    """Write the problem's structure graph and dependency graph to `path`, .svg or .png.

    An arrow of the left graph reads "has", of the right one "is needed for". A box of the right graph gives the
    parameter, its letter and formula, its value and its operations; leaves are at the top.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    nodes, asked = problem.nodes, problem.num_necessary - 1
    levels = _levels(nodes)
    layers = list(problem.categories.items())
    # widths of both graphs, in boxes; 2 have room for the title and the legend
    left, right = max(2, *(len(items) for _, items in layers)), max(2, *map(len, levels))
    svg = str(path).endswith(".svg")
    widths = [1.35 * left, 2.5 * right]
    with rc_context({"svg.hashsalt": "igsm"}):
        size = (sum(widths), 1.4 * max(len(layers), len(levels)) + 1)
        figure = Figure(figsize=size, layout="constrained", dpi=72 if svg else 110)
        structure, dependencies = figure.subplots(1, 2, width_ratios=widths)

        def box(axis, x, y, text, color, style="-"):
            return axis.text(x, y, text, ha="center", va="center", fontsize=8, zorder=2, linespacing=1.35,
                             bbox=dict(boxstyle="round,pad=0.4", fc=color, ec="#555555", ls=style))  # fmt: skip

        def arrow(axis, start, end, color, bend=0.0):
            axis.annotate("", end.get_position(), start.get_position(), zorder=1, arrowprops=dict(
                arrowstyle="-|>", color=color, lw=1, shrinkA=0, shrinkB=1, connectionstyle=f"arc3,rad={bend}",
                patchA=start.get_bbox_patch(), patchB=end.get_bbox_patch(),
            ))  # fmt: skip

        places = {}
        for row, (category, items) in enumerate(layers):
            structure.text(-0.75, -row, category, ha="right", va="center", fontsize=9, style="italic")
            for i, item in enumerate(items):
                x = (i + 0.5) * left / len(items) - 0.5
                places[item] = box(structure, x, -row, item.replace(" ", "\n"), "white")
        for node in nodes:
            if not node.abstract:
                arrow(structure, places[node.owner], places[node.thing], "#777777")

        depth_of = {v: depth for depth, level in enumerate(levels) for v in level}
        boxes = []
        for v, node in enumerate(nodes):
            level = levels[depth_of[v]]
            x = (level.index(v) + 0.5) * right / len(level)
            kind = ("redundant" if v > asked else "asked for" if v == asked else
                    "abstract" if node.abstract else "instance")  # fmt: skip
            formula = f" = {formula_text(node, problem.letters)}" if node.terms else ""
            line = f"{problem.letters[v]}{formula} = {node.value}"
            if v <= asked:
                line += f"   [{node.ops} op{'s' * (node.ops > 1)}]"
            title = node.name.removeprefix("each ")
            style = "--" if v > asked else "-"
            boxes.append(box(dependencies, x, -depth_of[v], f"{title}\n{line}", LEGEND[kind], style))
        for v, node in enumerate(nodes):
            x, y = boxes[v].get_position()
            for p in dict.fromkeys(node.parents):
                parent_x, span = boxes[p].get_position()[0], depth_of[v] - depth_of[p]
                between = [b.get_position() for b in boxes if y < b.get_position()[1] < y + span]
                behind = any(abs(x + (parent_x - x) * (by - y) / span - bx) < 0.5 for bx, by in between)  # a box
                arrow(dependencies, boxes[p], boxes[v], "#bbbbbb" if v > asked else "#444444", behind * 1.6 / span)
        ops = f"{problem.ops} operation{'s' * (problem.ops > 1)}"
        modulus = f", modulo {problem.modulus}" if problem.modulus else ""
        structure.set_title("who has what", fontsize=10)
        dependencies.set_title(f"what is needed for what: {ops}{modulus}", fontsize=10)
        dependencies.legend(
            handles=[Patch(fc=color, ec="#555555", label=kind) for kind, color in LEGEND.items()], ncols=4,
            loc="upper center", bbox_to_anchor=(0.5, -0.01), frameon=False, fontsize=8,
        )  # fmt: skip
        bottom = 0.5 - max(len(layers), len(levels))
        structure.set(xlim=(-1.6, left), ylim=(bottom, 0.5))
        dependencies.set(xlim=(-0.1, right + 0.1), ylim=(bottom, 0.5))
        for axis in (structure, dependencies):
            axis.axis("off")
        figure.draw_without_rendering()  # the boxes get their sizes, at which arrows end
        figure.savefig(path, dpi="figure", metadata={"Date": None} if svg else None)


def _levels(nodes):
    """Node indices by depth: leaves, then what needs leaves alone, ...; each near what it needs."""
    depth, levels = [], []
    for v, node in enumerate(nodes):
        depth.append(1 + max((depth[p] for p in node.parents), default=-1))
        while len(levels) <= depth[v]:
            levels.append([])
        levels[depth[v]].append(v)
    x = {}
    for level in levels:
        level.sort(key=lambda v: sum(x[p] for p in nodes[v].parents) / max(1, len(nodes[v].parents)))
        for i, v in enumerate(level):
            x[v] = (i + 0.5) / len(level)
    return levels
