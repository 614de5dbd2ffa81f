# An edit teacher for flux2_klein_edit.py and flux2_klein_24gb.py: imitation of edit pairs, with the
# source as FLUX.2's reference picture. As here local edits; with config/teacher_global_edit.py
# after it global ones.
# Memory: about 18 GB at 1024 pixels with two samples a forward, 13 GB at 512, and 9 GB while words
# are encoded (computed, not measured: base in bf16 7.8 GB or Qwen3 8 GB, adapter of rank 64 with
# its optimizer 1.9 GB, the rest activations and VAE).
import os
model = 'black-forest-labs/FLUX.2-klein-base-4B'  # Apache 2.0
family = 'Flux2KleinPipeline'
resolution = 1024
method = 'sft'
_folder = 'data/omniedit' if os.path.isfile('data/omniedit/local_edit.csv') else 'data/examples'
data = [f'{_folder}/local_edit.csv']              # 8 drawn pairs, to try it, until there are more
eval_data = [_p.replace('.csv', '_val.csv') for _p in data if 'omniedit' in _p]

rank = 64                                         # of the student as well, so it loses nothing
alpha = 64.0
sigmas = 'logit_normal'                           # usual for flows; from here on our choice
prompt_dropout = 0.1                              # guidance works afterwards
betas = [0.9, 0.999]
lr = 1e-4
lr_schedule = 'constant'
max_steps = 5000
batch_size = 16
micro_batch = 2
grad_checkpointing = True
ema_decay = 0.999
eval_every, save_every = 500, 100
eval_samples, score = 8, ''
sample_steps = 28
out_dir = 'out/klein_local_edit'
