#!/bin/bash
# Several machines under SLURM. Options of sbatch come first, flags of the trainer last:
#   sbatch --nodes 4 training/slurm.sh --config training/configs/pixelrepa_l16.yaml --train_data_dir /path/to/imagenet/train
# Ten minutes before the time limit, or at `scancel --batch --signal USR1 JOB`, the run writes a checkpoint and the job queues
# again, as it does after a preemption or the loss of a machine. --output_dir must be one folder that all machines see.
# Run by this project with SLURM 22.05 on CPUs only.
#SBATCH --job-name=pixelrepa
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append

export LAUNCH_FILE=${LAUNCH_FILE:-training/accelerate/8gpu.yaml} PROCESSES_PER_NODE=${PROCESSES_PER_NODE:-8}
export MAIN_PROCESS_IP=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1  # the launcher passes SIGUSR1 on to its processes,
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=540                           # and waits for their checkpoint
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # torch 2.13: otherwise a machine that joins again waits for an address

trap 'stopping=1; scancel --signal=USR1 "$SLURM_JOB_ID"' USR1
srun bash -c 'exec accelerate launch --config_file "$LAUNCH_FILE" \
    --num_machines "$SLURM_NNODES" --num_processes $((SLURM_NNODES * PROCESSES_PER_NODE)) \
    --machine_rank "$SLURM_NODEID" --main_process_ip "$MAIN_PROCESS_IP" --main_process_port 29500 \
    --rdzv_backend c10d --max_restarts 3 \
    training/train_pixelrepa.py --resume_from_checkpoint latest "$@"' _ "$@" &
wait $!
status=$?
if [ "${stopping:-}" ]; then
    wait  # the trap ended the first wait
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
