# An edit teacher for kontext_edit.py: imitation of edit pairs, the source as Kontext takes it. As
# here local edits; with config/teacher_global_edit.py after it global ones. All numbers are ours.
# Memory, computed, not measured: 60 GB at 1024 pixels, 46 GB at 512 (base in bf16 24 GB, adapter
# of rank 64 with its optimizer 5 GB, the rest activations of two samples and VAE).
import os
model = 'black-forest-labs/FLUX.1-Kontext-dev'  # gated, not commercial: accept, then hf auth login
family = 'FluxKontextPipeline'
resolution = 1024
distilled_guidance = 1.0                    # pictures of data are not guided ones; afterwards
method = 'sft'                              # it is asked with 2.5, as the base was
_folder = 'data/omniedit' if os.path.isfile('data/omniedit/local_edit.csv') else 'data/examples'
data = [f'{_folder}/local_edit.csv']        # 8 drawn pairs, to try it, until there are more
eval_data = [_p.replace('.csv', '_val.csv') for _p in data if 'omniedit' in _p]

rank = 64                                   # the student's
alpha = 64.0
sigmas = 'logit_normal'
betas = [0.9, 0.999]
lr = 1e-4
lr_schedule = 'constant'
max_steps = 5000
batch_size = 16
micro_batch = 2
grad_checkpointing = True
ema_decay = 0.999
eval_every, save_every, eval_samples, sample_steps = 500, 100, 8, 28
score = ''
out_dir = 'out/kontext_local_edit'
