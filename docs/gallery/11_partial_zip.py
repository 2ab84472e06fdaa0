"""
One trunk, a tail for each task
===============================

Two networks trained apart on five digits each. Zipped whole they are one network; under a budget of
multiply-adds only the first layers are merged, and each task keeps the last layers of its expert.
Between one network and both of them lies a curve.
"""

import fusion
from fusion.figures.style import COLORS, house_style, new_figure
from fusion.models import MultiTaskNetwork, cost_of

pool, tasks = fusion.load_modelpool("digits_split"), fusion.load_taskpool("digits_split")

# %%
# Zipped under growing budgets, and both networks side by side. The units of a network may be merged
# with each other too: that makes room where the tasks need features of their own.

budgets = (1.2, 1.4, 1.6, 1.8)
networks = {
    "alignment": fusion.merge(pool, "git_rebasin", by="activations"),
    "zip": fusion.merge(pool, "zipit"),
    **{f"zip, {budget}": fusion.merge(pool, "zipit", budget=budget) for budget in budgets},
    "both": MultiTaskNetwork(
        {name: pool.load_model(name) for name in pool.model_names},
        {name: pool.labels(name) for name in pool.model_names},
    ),
}
measured = {name: tasks.evaluate(network) for name, network in networks.items()}
joint = {name: 100 * found["joint"]["accuracy"] for name, found in measured.items()}
own = {
    name: 100 * sum(found[task]["accuracy"] for task in pool.tasks) / len(pool.tasks)
    for name, found in measured.items()
}

# %%
# What a result costs for both tasks. A trunk runs once for all of them, and so does a body if heads
# alone differ.

shape = pool.dataset("low")[0][0].shape
one = cost_of(pool.load_model("low"), shape).multiply_adds
cost = {name: cost_of(network, shape).multiply_adds / one for name, network in networks.items()}
for name in networks:
    print(f"{name:10s} {cost[name]:.2f} times the multiply-adds, {joint[name]:.1f} %")

# %%
# Each task's network reads the features that it needs out of the trunk's, and goes on as its expert
# does.

first = networks["zip, 1.4"].for_task("low")
print(f"separate from {first.cut.layer} on; read: {[one.source for one in first.cut.crossings]}")

# %%

with house_style():
    figure = new_figure(width=4.4, height=2.9)
    axes = figure.add_subplot()
    curve = [name for name in networks if name != "alignment"]
    for number, (what, accuracy) in enumerate({"each task": own, "all ten digits": joint}.items()):
        color = COLORS[number]
        axes.plot([cost[n] for n in curve], [accuracy[n] for n in curve], "o-", color=color)
        axes.plot(cost["alignment"], accuracy["alignment"], "s", color=color)
        axes.annotate(
            "alignment",
            (1.0, accuracy["alignment"]),
            (7, 0),
            textcoords="offset points",
            va="center",
        )
        axes.annotate(
            what, (1.6, accuracy["zip, 1.6"]), (0, -12), textcoords="offset points", color=color
        )
    axes.margins(y=0.12)
    axes.set_xlabel("multiply-adds: zipped whole (1.0) … both networks (2.0)")
    axes.set_ylabel("test accuracy (%)")
