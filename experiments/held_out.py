"""Images that choose a learning rate: those held out by a run of seed 5, which take no part in its
training, as images to evaluate on:

    papermill nbs/09_evaluate.ipynb out.ipynb -p checkpoint RUN/best.safetensors \\
        -p dataset experiments/held_out.py:fashion_mini -p eps 0.1 -p step_size 0.03"""
from weat_nb.config import TrainConfig
from weat_nb.epoch import training_data

SEED = 5 # no run that is tested has it


def held_out(dataset, split):
    "The images that the run is trained on, or those that it holds out"
    train, held, _ = training_data(TrainConfig(dataset=dataset, seed=SEED))
    return train if split == 'train' else held


def fashion_mini(split): return held_out('fashion_mini', split)


def cifar10(split): return held_out('cifar10', split)
