# DanceOPD's main experiment (2606.27377), two edit teachers into one student, on Z-Image. Through
# diffusers it is the Omni model that takes a source picture (until it is out: flux2_klein_edit.py);
# the paper taught the text-to-image model to, with code of its own. Its teachers are not published:
# the messages say how to make yours.
# Memory, computed, not measured: 40 GB at 1024 pixels (base in bf16 12 GB, adapters of rank 128
# with the optimizer 10 GB, the rest activations, VAE and the SigLIP encoder). rank = 32 saves 7
# GB.
import os
_make = 'python train_teacher.py config/teacher_zimage_edit_sft.py'
model = 'Tongyi-MAI/Z-Image-Omni-Base'      # announced; not out when this was written
family = 'ZImageOmniPipeline'
resolution = 1024
teachers = [dict(name='local_edit', lora='out/zimage_local_edit', make=_make),
            dict(name='global_edit', lora='out/zimage_global_edit',
                 make=f'{_make} config/teacher_global_edit.py')]
routes = [dict(teacher=_k, data=_k) for _k in ('local_edit', 'global_edit')]
routes_per_step = 1                         # published, with equal weights
_folder = 'data/omniedit' if os.path.isfile('data/omniedit/local_edit.csv') else 'data/examples'
data = [f'{_folder}/local_edit.csv', f'{_folder}/global_edit.csv']
eval_data = [_p.replace('.csv', '_val.csv') for _p in data if 'omniedit' in _p]

init_from = 'out/zimage_local_edit'         # published: 5.75; merged 4.19, global 2.70, T2I 1.89
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
out_dir = 'out/zimage_edit'
