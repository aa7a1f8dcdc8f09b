"""ALBERT (Lan et al. 2020) in Equinox: the model, masked language modelling, and its data.

    task = AlbertForMaskedLM.init(AlbertConfig.preset("small"), jax.random.key(0))
    task = Trainer(max_steps=3000).fit(task, data)

`albert pretrain` on the command line does all of it, from text to a trained model.
"""

from ._base import AlbertTask as AlbertTask
from ._classification import AlbertForMultipleChoice as AlbertForMultipleChoice
from ._classification import AlbertForSequenceClassification as AlbertForSequenceClassification
from ._classification import AlbertForTokenClassification as AlbertForTokenClassification
from ._config import AlbertConfig as AlbertConfig
from ._convert import from_pretrained as from_pretrained
from ._convert import save_pretrained as save_pretrained
from ._data import PretrainingData as PretrainingData
from ._data import UnigramBaseline as UnigramBaseline
from ._encoded import BucketLoader as BucketLoader
from ._encoded import Encoded as Encoded
from ._fill_mask import Filled as Filled
from ._fill_mask import Guess as Guess
from ._fill_mask import fill_mask as fill_mask
from ._fill_mask import pseudo_perplexity as pseudo_perplexity
from ._glue import GLUE as GLUE
from ._glue import glue_scores as glue_scores
from ._masking import Masked as Masked
from ._masking import mask_tokens as mask_tokens
from ._model import Albert as Albert
from ._model import MaskedLMHead as MaskedLMHead
from ._names import from_tensors as from_tensors
from ._names import to_tensors as to_tensors
from ._optimizers import Recipe as Recipe
from ._pretraining_task import AlbertForPreTraining as AlbertForPreTraining
from ._question_answering import AlbertForQuestionAnswering as AlbertForQuestionAnswering
from ._rows import check_tokens as check_tokens
from ._rows import check_vocabulary as check_vocabulary
from ._segments import RowLoader as RowLoader
from ._segments import SegmentRows as SegmentRows
from ._sentences import sentences as sentences
from ._squad import Question as Question
from ._squad import answers as answers
from ._squad import read_questions as read_questions
from ._squad import windows as windows
from ._squad_metrics import Answered as Answered
from ._squad_metrics import questions_of as questions_of
from ._squad_metrics import squad_scores as squad_scores
from ._store import TokenStore as TokenStore
from ._store import encode_documents as encode_documents
from ._store import open_tokens as open_tokens
from ._tasks import AlbertForMaskedLM as AlbertForMaskedLM
from ._text import DatasetText as DatasetText
from ._text import TextFiles as TextFiles
from ._text import open_dataset as open_dataset
from ._tf_names import from_tf_names as from_tf_names
from ._tokenizer import SpecialIds as SpecialIds
from ._tokenizer import WordStarts as WordStarts
from ._tokenizer import load_tokenizer as load_tokenizer
from ._tokenizer import special_ids as special_ids
from ._tokenizer import train_tokenizer as train_tokenizer
