"""The sub-commands, one module each."""

# Name of a sub-command -> what it does. Its arguments and its work are in `sret_scale.commands.NAME`.
COMMANDS = {
    "demo": "run every part once on the sample images: teacher, student of 108 applications, control, report",
    "train": "train a recipe or a preset on one node or many; repeat the command to continue a run",
    "evaluate": "measure a run's accuracy on a whole test set",
    "predict": "name what a trained model sees on images",
    "translate": "translate lines, by a trained translator",
    "generate": "go on with a text, by a trained language model",
    "checkpoint": "list or verify a run's checkpoints",
    "shards": "write, check and inspect webdataset shards",
    "labels": "store a teacher's soft labels, to train from them without the teacher",
    "describe": "show a model's parameters, multiply-adds and depth",
    "config": "print every setting of a run: type, default, meaning",
    "plan": "fit a model into a device's memory: choose micro-batch and recomputation, predict bytes",
    "weights": "convert published weights in both directions; add loops to a trained model or tie its blocks",
    "sweep": "run an experiment over depth or any other setting, and report on it",
    "report": "draw one page from run folders: curves, tables, and how to repeat the runs",
    "analyze": "analyse trained runs: what each loop is worth, through how many loops a gradient must go",
    "doctor": "check this machine, or all nodes together, before a long run",
    "slurm": "print a batch file that runs a command on a Slurm cluster",
    "export": "write a trained model as ONNX or a torch program",
}
