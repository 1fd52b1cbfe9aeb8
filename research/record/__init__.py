"""The record of a run, in a workdir that is local, on gs:// or on s3://.

config.json          the resolved config (`json_files.py`; read by `config_json.py`)
tokenizer.json       the tokenizer of a text, a copy, if it is not bytes (`data_json.py`)
data.json            fingerprints, shapes, label names and statistics of the data (`data_json.py`)
metrics.jsonl        a line for every logged step and epoch (`json_files.py`)
summary.json         the results, once the run has finished (`json_files.py`; made by `training/summary.py`)
<name>.png           plots (`writer.py`, `drawing.py`)
tensorboard/         the same numbers and plots as TensorBoard events (`events.py`)
trackers.json        the run's id in trackers, and their names (`trackers.py`)
checkpoints/<step>/  the state (`training/checkpoint.py`)
.lock                keeps a second run away (`workdir.py`)
"""
