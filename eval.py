"""Evaluate models: python eval.py checkpoint=outputs/b32 "evaluator=[zeroshot_nct_crc_100k,retrieval_val]" """

from pathlib import Path

from quiltnet.cli.hydra_main import eval_main

if __name__ == "__main__":
    eval_main(conf=str(Path(__file__).resolve().parent / "conf"))
