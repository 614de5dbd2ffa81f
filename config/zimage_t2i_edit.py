# DanceOPD's second experiment on Z-Image: two buckets, text-to-image with the frozen base as its
# teacher, and edits with one teacher for both kinds. Editing takes the Omni model, see
# zimage_edit.py.
# Memory, computed, not measured: 40 GB at 1024 pixels, as there.
import os
model = 'Tongyi-MAI/Z-Image-Omni-Base'      # announced; not out when this was written
family = 'ZImageOmniPipeline'
resolution = 1024
teachers = [dict(name='base'),
            dict(name='edit', lora='out/zimage_both_edits',
                 make='python train_teacher.py config/teacher_zimage_edit_sft.py '
                      'config/teacher_both_edits.py')]
routes = [dict(teacher='base', data='t2i', weight=2.0),  # as many steps as both kinds of edits
          dict(teacher='edit', data='local_edit'), dict(teacher='edit', data='global_edit')]
routes_per_step = 1                         # DanceOPD's; on the shapes 'sample' learned more
_folder = 'data/omniedit' if os.path.isfile('data/omniedit/local_edit.csv') else 'data/examples'
_pairs = [f'{_folder}/local_edit.csv', f'{_folder}/global_edit.csv']
data = ['data/examples/t2i.txt', *_pairs]   # 30 prompts, to try it; a run wants thousands
eval_data = [_p.replace('.csv', '_val.csv') for _p in _pairs if 'omniedit' in _p]

init_from = 'out/zimage_both_edits'         # ours: the paper does not say the start of this run
lora_targets = ['to_q', 'to_k', 'to_v', 'to_out.0', 'w1', 'w2', 'w3']  # published
rank = 128                                  # from here to max_steps as published
alpha = 128.0
steps, drop_last = 16, 0
method = 'danceopd'
query = 'low_noise'
betas = [0.9, 0.999]                        # ours: torch's; warm-up and average are ours too
lr = 2e-4
lr_schedule = 'constant'                    # ours: nothing is said
max_steps = 3000
batch_size = 32                             # published: 4 accumulated; ours: on 8 GPUs
micro_batch, grad_checkpointing = 1, True   # ours, as all below
ema_decay = 0.99
eval_every, save_every, eval_samples, sample_steps = 300, 50, 8, 28
score = ''
out_dir = 'out/zimage_t2i_edit'
