"""Figures that say how good a model is. `metrics.evaluate` is the way in; each metric is a function of its own:

    metrics.py         the table of metrics, and the result
    evaluation.py      model, pictures and features that metrics ask for
distances.py       distances between two sets of features: FID, KID, IS, precision, recall, density, coverage
features.py        the networks that give the features
pictures.py        sets of pictures: a split of a run's data, a folder
store.py           features of a set, kept on disk
sampling.py        drawn pictures, on one device or several
quality.py         what is seen in the pictures: classes, sharpness, nearest training images
reconstruction.py  autoencoders
captions.py        text-to-image models of captioned drawings
recognition.py     classifiers, with corruptions.py
likelihood.py      bits per dimension
callback.py        a small evaluation while a model trains
"""
