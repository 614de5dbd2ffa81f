# Laid over a config of an edit teacher: global edits in place of local ones.
#     python train_teacher.py config/teacher_sd35_edit_sft.py config/teacher_global_edit.py
data = [_p.replace('local_edit', 'global_edit') for _p in data]
eval_data = [_p.replace('local_edit', 'global_edit') for _p in eval_data]
out_dir = out_dir.replace('local_edit', 'global_edit')
