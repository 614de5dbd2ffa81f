# An edit teacher for zimage_edit.py: imitation of edit pairs, the source as Omni takes it. As here
# local edits; with config/teacher_global_edit.py after it global ones, with teacher_both_edits.py
# both. How DanceOPD trained its own is not said: all numbers are ours.
# Memory, computed, not measured: 42 GB at 1024 pixels (base in bf16 12 GB, adapter of rank 128
# with its optimizer 9 GB, the rest activations of two samples, VAE and the SigLIP encoder).
import os
model = 'Tongyi-MAI/Z-Image-Omni-Base'      # announced; not out when this was written
family = 'ZImageOmniPipeline'
resolution = 1024
method = 'sft'                              # 8 drawn pairs, to try it, until there are more
_folder = 'data/omniedit' if os.path.isfile('data/omniedit/local_edit.csv') else 'data/examples'
data = [f'{_folder}/local_edit.csv']
eval_data = [_p.replace('.csv', '_val.csv') for _p in data if 'omniedit' in _p]

lora_targets = ['to_q', 'to_k', 'to_v', 'to_out.0', 'w1', 'w2', 'w3']  # the student's
rank = 128                                  # the student's: a start from here loses nothing
alpha = 128.0
sigmas = 'logit_normal'
prompt_dropout = 0.1                        # usual; guidance works afterwards
betas = [0.9, 0.999]
lr = 1e-4
lr_schedule = 'constant'
max_steps = 10000
batch_size = 32
micro_batch = 2
grad_checkpointing = True
ema_decay = 0.999
eval_every, save_every, eval_samples, sample_steps = 1000, 100, 8, 28
score = ''
out_dir = 'out/zimage_local_edit'
