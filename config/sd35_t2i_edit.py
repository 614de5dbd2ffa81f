# SD3.5-medium learns to edit and keeps what it could: the frozen base answers for text-to-image
# prompts, an edit teacher for edit instructions. DanceOPD did this on Z-Image (zimage_t2i_edit.py);
# its settings, on a model that one card of 24 GB holds.
# Memory, computed, not measured: 24 GB at 1024 pixels, 16 GB at 512, as in sd35_edit.py.
import os
model = 'stabilityai/stable-diffusion-3.5-medium'  # gated: accept its licence, then hf auth login
family = 'StableDiffusion3Pipeline'
resolution = 1024
teachers = [dict(name='base'),
            dict(name='edit', lora='out/sd35_both_edits',
                 make='python train_teacher.py config/teacher_sd35_edit_sft.py '
                      'config/teacher_both_edits.py')]
routes = [dict(teacher='base', data='t2i', weight=2.0),  # as many steps as both kinds of edits
          dict(teacher='edit', data='local_edit'), dict(teacher='edit', data='global_edit')]
routes_per_step = 1                         # DanceOPD's; on the shapes 'sample' learned more
_folder = 'data/omniedit' if os.path.isfile('data/omniedit/local_edit.csv') else 'data/examples'
_pairs = [f'{_folder}/local_edit.csv', f'{_folder}/global_edit.csv']
data = ['data/examples/t2i.txt', *_pairs]   # 30 prompts, to try it; a run wants thousands
eval_data = [_p.replace('.csv', '_val.csv') for _p in _pairs if 'omniedit' in _p]

init_from = 'out/sd35_both_edits'           # ours: the paper does not say the start of this run
rank = 128                                  # from here to max_steps DanceOPD's
alpha = 128.0
steps, drop_last = 16, 0
method = 'danceopd'
query = 'low_noise'
betas = [0.9, 0.999]                        # ours: torch's; warm-up and average are ours too
lr = 2e-4
lr_schedule = 'constant'                    # ours: nothing is said
max_steps = 3000
batch_size = 32                             # published: 4 accumulated; ours: on 8 GPUs
micro_batch = 1                             # ours, as all below
grad_checkpointing = True
ema_decay = 0.99
eval_every, save_every, eval_samples, sample_steps = 300, 50, 8, 28
score = ''
out_dir = 'out/sd35_t2i_edit'
