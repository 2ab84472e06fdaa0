"""
Where experts conflict
======================

A task vector is what fine-tuning changed: expert minus base. Two experts whose changes point the
same way in a layer can share it; opposite changes cancel when they are added.

The pool is one that comes with the package: four experts on handwritten digits. It is composed as
the command line does, trained when first used, and kept on disk.
"""

import fusion
from fusion.figures.layer_agreement import layer_agreement
from fusion.figures.similarity_heatmap import similarity_heatmap
from fusion.method import TaskVectorCosSimilarity

pool = fusion.load_modelpool("digits_tasks")

# %%
# The analysis reads the experts tensor by tensor; its tables are attributes afterwards.

analysis = TaskVectorCosSimilarity(per_layer=True)
analysis.run(pool)
print(analysis.summary.round(2).T.to_string())

# %%
# The cosine of every pair over the whole network:

whole = similarity_heatmap(analysis.similarity)

# %%
# The same in every layer. Early layers agree more than late ones where tasks look for the same
# things in an image.

layers = layer_agreement(analysis.layer_similarity)
layers.axes[0].set_ylabel("layer")
