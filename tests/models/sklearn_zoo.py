"""Converts models of scikit-learn, LightGBM and XGBoost to ONNX, and computes what ONNX Runtime answers.

    python sklearn_zoo.py FOLDER [NAME...]

For every model that is converted the folder gets NAME.onnx, and NAME.in.npz with NAME.out.npz for 1 and for 13 rows (NAME.2.in.npz, ...).
`cutover verify NAME.onnx --inputs NAME.in.npz --expect NAME.out.npz` must agree on every backend. A model that the converter refuses is
listed. Needs scikit-learn, skl2onnx, onnxmltools, lightgbm, xgboost and onnxruntime.
"""

import sys
import traceback
import warnings
from pathlib import Path

import lightgbm
import numpy as np
import onnxruntime
import xgboost
from onnxmltools.convert.lightgbm.operator_converters.LightGbm import convert_lightgbm
from onnxmltools.convert.xgboost.operator_converters.XGBoost import convert_xgboost
from skl2onnx import to_onnx, update_registered_converter
from skl2onnx.common.data_types import (DoubleTensorType, FloatTensorType, Int64TensorType, StringTensorType)
from skl2onnx.common.shape_calculator import (calculate_linear_classifier_output_shapes,
                                              calculate_linear_regressor_output_shapes)
from sklearn import (calibration, cluster, compose, cross_decomposition, decomposition, discriminant_analysis, ensemble,
                     feature_extraction, feature_selection, gaussian_process, impute, isotonic, kernel_approximation,
                     linear_model, mixture, model_selection, multiclass, naive_bayes, neighbors, neural_network,
                     pipeline, preprocessing, random_projection, svm, tree)

ROWS = (13, 1)
rng = np.random.default_rng(7)

for model in (lightgbm.LGBMClassifier, xgboost.XGBClassifier):
    convert = convert_lightgbm if model is lightgbm.LGBMClassifier else convert_xgboost
    options = {"nocl": [True, False], "zipmap": [True, False, "columns"]}
    update_registered_converter(model, model.__name__, calculate_linear_classifier_output_shapes, convert,
                                options=options)
for model in (lightgbm.LGBMRegressor, xgboost.XGBRegressor):
    convert = convert_lightgbm if model is lightgbm.LGBMRegressor else convert_xgboost
    update_registered_converter(model, model.__name__, calculate_linear_regressor_output_shapes, convert,
                                options={"split": None} if model is lightgbm.LGBMRegressor else None)

# Six numbers a row, of two and of three classes, with names, and of a target.
X = rng.normal(size=(400, 6)).astype(np.float32)
Y2 = (X[:, 0] + X[:, 1] * X[:, 2] + 0.3 * rng.normal(size=400) > 0).astype(np.int64)
Y3 = np.digitize(X[:, 0] + X[:, 1] * X[:, 2], [-0.6, 0.6]).astype(np.int64)
NAMES = np.array(["lilac", "oak", "yew"])[Y3]
T = (X[:, 0] * 2 + np.sin(X[:, 1]) + X[:, 2] * X[:, 3]).astype(np.float32)
T2 = np.stack([T, X[:, 4] - X[:, 5]], 1)
GAPS = np.where(rng.random(X.shape) < 0.15, np.nan, X).astype(np.float32)
COUNTS = rng.integers(0, 9, size=(400, 6)).astype(np.int64)
COLOURS = rng.choice(["red", "green", "blue", "grey"], size=(400, 1))
SIZES = rng.choice(["S", "M", "L"], size=(400, 1))
TEXTS = rng.choice(
    ["the cat sat on the mat", "a dog barked at the cat", "rain falls mainly on the plain", "the dog and the rain",
     "mats and cats", "plain text, again and again", "no rain today"], size=(400, 1))

ZOO = {}


def add(name, model, y=None, x=X, opset=None, types=None, **options):
    """Lists `model`, to be fitted to `x` and `y`; `options` are the converter's, `types` those of the inputs where `x` is a dictionary."""
    ZOO[name] = (model, x, y, opset, types, options)


def numbers():
    logistic = linear_model.LogisticRegression(max_iter=500)
    for name, y in {"2": Y2, "3": Y3, "names": NAMES}.items():
        for zipmap in (True, False, "columns"):
            add(f"logistic_{name}_{str(zipmap).lower()}", logistic, y, zipmap=zipmap)
        forest = ensemble.RandomForestClassifier(12, random_state=1)
        add(f"forest_{name}", forest, y, zipmap=True)
        add(f"forest_{name}_double", forest, y, X.astype(np.float64), zipmap=False)
        add(f"forest_{name}_opset12", forest, y, opset=12, zipmap=False)
        add(f"forest_{name}_ml1", forest, y, opset={"": 15, "ai.onnx.ml": 1}, zipmap=False)
        add(f"extra_{name}", ensemble.ExtraTreesClassifier(9, max_depth=5, random_state=1), y, zipmap=False)
        add(f"boosting_{name}", ensemble.GradientBoostingClassifier(n_estimators=12), y, zipmap=False)
        add(f"tree_{name}", tree.DecisionTreeClassifier(max_depth=6), y, zipmap=True)
        add(f"bagging_{name}", ensemble.BaggingClassifier(n_estimators=4), y, zipmap=False)
        add(f"ada_{name}", ensemble.AdaBoostClassifier(n_estimators=5), y, zipmap=False)
        add(f"mlp_{name}", neural_network.MLPClassifier((12, 7), max_iter=80), y, zipmap=False)
        add(f"sgd_{name}", linear_model.SGDClassifier(loss="log_loss"), y, zipmap=False)
        add(f"knn_{name}", neighbors.KNeighborsClassifier(5), y, zipmap=False)
        add(f"gaussian_nb_{name}", naive_bayes.GaussianNB(), y, zipmap=False)
        add(f"bernoulli_nb_{name}", naive_bayes.BernoulliNB(binarize=0.1), y, zipmap=True)
        add(f"multinomial_nb_{name}", naive_bayes.MultinomialNB(), y, COUNTS, zipmap=False)
        add(f"complement_nb_{name}", naive_bayes.ComplementNB(), y, COUNTS, zipmap=False)
        add(f"lda_{name}", discriminant_analysis.LinearDiscriminantAnalysis(), y, zipmap=False)
        add(f"qda_{name}", discriminant_analysis.QuadraticDiscriminantAnalysis(), y, zipmap=False)
        add(f"ridge_{name}", linear_model.RidgeClassifier(), y, zipmap=False)
        add(f"perceptron_{name}", linear_model.Perceptron(), y, zipmap=False)
        add(f"linear_svc_{name}", svm.LinearSVC(), y)
        add(f"one_vs_rest_{name}", multiclass.OneVsRestClassifier(logistic), y, zipmap=False)
        add(f"calibrated_{name}", calibration.CalibratedClassifierCV(svm.LinearSVC(), cv=2), y, zipmap=False)
        add(f"gaussian_process_{name}", gaussian_process.GaussianProcessClassifier(), y[:60], X[:60], zipmap=False)
        voting = [("a", logistic), ("b", tree.DecisionTreeClassifier(max_depth=3)), ("c", naive_bayes.GaussianNB())]
        add(f"voting_{name}", ensemble.VotingClassifier(voting, voting="soft", flatten_transform=False), y, zipmap=False)
        add(f"voting_hard_{name}", ensemble.VotingClassifier(voting, voting="hard", flatten_transform=False), y, zipmap=False)
        add(f"stacking_{name}", ensemble.StackingClassifier(voting, cv=2), y, zipmap=False)
        for kernel in ("linear", "poly", "rbf", "sigmoid"):
            for probability in (False, True):
                model = svm.SVC(kernel=kernel, probability=probability, gamma=0.2, coef0=0.3)
                add(f"svc_{kernel}_{name}{'_proba' if probability else ''}", model, y, zipmap=probability)
        add(f"nu_svc_{name}", svm.NuSVC(nu=0.3, probability=True), y, zipmap=False)
        add(f"lightgbm_{name}", lightgbm.LGBMClassifier(n_estimators=12, verbose=-1), y, GAPS,
            opset={"": 15, "ai.onnx.ml": 3}, zipmap=name == "2")
        add(f"search_{name}", model_selection.GridSearchCV(logistic, {"C": [0.1, 1.0]}, cv=2), y, zipmap=False)
        add(f"decisions_{name}", logistic, y, zipmap=False, raw_scores=True)
    for name, y in {"2": Y2, "3": Y3}.items():
        add(f"xgboost_{name}", xgboost.XGBClassifier(n_estimators=12, max_depth=4), y, GAPS,
            opset={"": 15, "ai.onnx.ml": 3}, zipmap=False)
    for name, model in {
            "linear": linear_model.LinearRegression(), "ridge": linear_model.Ridge(), "lasso": linear_model.Lasso(0.01),
            "elastic": linear_model.ElasticNet(0.01), "bayesian": linear_model.BayesianRidge(),
            "huber": linear_model.HuberRegressor(), "sgd": linear_model.SGDRegressor(),
            "poisson": linear_model.PoissonRegressor(), "tweedie": linear_model.TweedieRegressor(power=0),
            "ransac": linear_model.RANSACRegressor(random_state=1), "theil": linear_model.TheilSenRegressor(),
            "forest": ensemble.RandomForestRegressor(12), "extra": ensemble.ExtraTreesRegressor(9),
            "boosting": ensemble.GradientBoostingRegressor(n_estimators=12),
            "tree": tree.DecisionTreeRegressor(max_depth=6), "bagging": ensemble.BaggingRegressor(n_estimators=4),
            "ada": ensemble.AdaBoostRegressor(n_estimators=5), "mlp": neural_network.MLPRegressor(hidden_layer_sizes=(12, ), max_iter=80),
            "knn": neighbors.KNeighborsRegressor(4), "radius": neighbors.RadiusNeighborsRegressor(3.0),
            "svr_rbf": svm.SVR(), "svr_poly": svm.SVR(kernel="poly", degree=2), "svr_linear": svm.SVR(kernel="linear"),
            "svr_sigmoid": svm.SVR(kernel="sigmoid"), "nu_svr": svm.NuSVR(), "linear_svr": svm.LinearSVR(),
            "gaussian_process": gaussian_process.GaussianProcessRegressor(gaussian_process.kernels.RBF(), alpha=1.0,
                                                                          normalize_y=True),
            "voting": ensemble.VotingRegressor([("a", linear_model.Ridge()), ("b", tree.DecisionTreeRegressor())]),
            "stacking": ensemble.StackingRegressor([("a", linear_model.Ridge()), ("b", tree.DecisionTreeRegressor())]),
            "lightgbm": lightgbm.LGBMRegressor(n_estimators=12, verbose=-1),
            "xgboost": xgboost.XGBRegressor(n_estimators=12, max_depth=4),
    }.items():
        opset = {"": 15, "ai.onnx.ml": 3} if name in ("lightgbm", "xgboost") else None
        positive = np.abs(T) if name in ("poisson", ) else T
        x = GAPS if name in ("lightgbm", "xgboost") else X
        add(f"regress_{name}", model, positive, x, opset)
        if name in ("linear", "forest", "boosting", "mlp", "knn", "svr_rbf", "gaussian_process", "tree"):
            add(f"regress_{name}_double", model, positive, X.astype(np.float64))
    add("regress_forest_two", ensemble.RandomForestRegressor(8), T2)
    add("regress_linear_two", linear_model.LinearRegression(), T2)
    add("regress_knn_two", neighbors.KNeighborsRegressor(4), T2)
    add("regress_pls", cross_decomposition.PLSRegression(2), T2)
    add("forest_counts", ensemble.RandomForestClassifier(12), Y3, COUNTS, zipmap=False)
    add("isotonic_free", linear_model.LinearRegression(), T, COUNTS)
    add("isolation", ensemble.IsolationForest(n_estimators=12, random_state=1), opset={"": 15, "ai.onnx.ml": 3})
    add("local_outlier", neighbors.LocalOutlierFactor(novelty=True))
    add("one_class", svm.OneClassSVM(nu=0.2))
    add("kmeans", cluster.KMeans(4, n_init=1))
    add("mini_kmeans", cluster.MiniBatchKMeans(4, n_init=1))
    add("mixture", mixture.GaussianMixture(3, random_state=1))
    add("bayes_mixture", mixture.BayesianGaussianMixture(n_components=3, random_state=1))
    add("forest_mlcat", ensemble.RandomForestClassifier(9, max_depth=4), np.stack([Y2, Y3], 1), zipmap=False)


def transformers():
    for name, model in {
            "standard": preprocessing.StandardScaler(), "minmax": preprocessing.MinMaxScaler(clip=True),
            "maxabs": preprocessing.MaxAbsScaler(), "robust": preprocessing.RobustScaler(),
            "normalizer_l1": preprocessing.Normalizer("l1"), "normalizer_l2": preprocessing.Normalizer("l2"),
            "normalizer_max": preprocessing.Normalizer("max"),
            "binarizer": preprocessing.Binarizer(threshold=0.2),
            "polynomial": preprocessing.PolynomialFeatures(3), "power": preprocessing.PowerTransformer(),
            "bins": preprocessing.KBinsDiscretizer(4, encode="onehot-dense"),
            "bins_ordinal": preprocessing.KBinsDiscretizer(4, encode="ordinal"),
            "spline_free": preprocessing.FunctionTransformer(), "pca": decomposition.PCA(3, whiten=True),
            "incremental_pca": decomposition.IncrementalPCA(3), "svd": decomposition.TruncatedSVD(3),
            "kernel_pca": decomposition.KernelPCA(3, kernel="rbf"),
            "projection": random_projection.GaussianRandomProjection(3),
            "nystroem_free": pipeline.make_pipeline(preprocessing.StandardScaler(), decomposition.PCA(2)),
    }.items():
        add(f"transform_{name}", model)
        if name in ("standard", "minmax", "normalizer_l2", "pca", "polynomial", "bins"):
            add(f"transform_{name}_double", model, None, X.astype(np.float64))
    add("transform_impute", impute.SimpleImputer(), None, GAPS)
    add("transform_impute_median_double", impute.SimpleImputer(strategy="median"), None, GAPS.astype(np.float64))
    add("transform_impute_knn", impute.KNNImputer(n_neighbors=2), None, GAPS)
    add("transform_impute_ints", impute.SimpleImputer(missing_values=0, strategy="most_frequent"), None, COUNTS)
    add("transform_select", feature_selection.SelectKBest(k=3), Y2)
    add("transform_variance", feature_selection.VarianceThreshold(0.5))
    add("transform_rfe", feature_selection.RFE(linear_model.LogisticRegression(), n_features_to_select=2), Y2)
    add("transform_onehot_ints", preprocessing.OneHotEncoder(sparse_output=False, handle_unknown="ignore"), None, COUNTS)
    add("transform_ordinal_ints", preprocessing.OrdinalEncoder(), None, COUNTS)
    both = np.concatenate([COLOURS, SIZES], 1)
    add("transform_onehot", preprocessing.OneHotEncoder(sparse_output=False, handle_unknown="ignore"), None, both)
    add("transform_onehot_drop", preprocessing.OneHotEncoder(sparse_output=False, drop="first"), None, both)
    add("transform_ordinal", preprocessing.OrdinalEncoder(), None, both)
    add("transform_target", preprocessing.TargetEncoder(), Y2, both)
    add("transform_labels", preprocessing.LabelEncoder(), None, COLOURS[:, 0])
    add("transform_label_binarizer", preprocessing.LabelBinarizer(), None, COUNTS[:, :1])
    add("transform_count", feature_extraction.text.CountVectorizer(ngram_range=(1, 2)), None, TEXTS[:, 0], locale="C")
    add("transform_tfidf", feature_extraction.text.TfidfVectorizer(stop_words=["the"]), None, TEXTS[:, 0], locale="C")
    add("transform_chars", feature_extraction.text.CountVectorizer(analyzer="char", ngram_range=(1, 3)), None, TEXTS[:, 0], locale="C")


def pipelines():
    scaled = pipeline.make_pipeline(preprocessing.StandardScaler(), svm.SVC(probability=True))
    add("pipe_svc", scaled, NAMES, zipmap=True)
    add("pipe_text", pipeline.make_pipeline(feature_extraction.text.TfidfVectorizer(lowercase=False),
                                            linear_model.LogisticRegression()), Y3, TEXTS[:, 0], zipmap=False)
    union = pipeline.make_union(preprocessing.StandardScaler(), decomposition.PCA(2))
    add("pipe_union", pipeline.make_pipeline(union, linear_model.LogisticRegression()), Y2, zipmap="columns")
    columns = {f"n{i}": GAPS[:, i:i + 1] for i in range(2)} | {"colour": COLOURS, "size": SIZES}
    types = [(f"n{i}", FloatTensorType([None, 1])) for i in range(2)]
    types += [(name, StringTensorType([None, 1])) for name in ("colour", "size")]
    numeric = pipeline.make_pipeline(impute.SimpleImputer(strategy="median"), preprocessing.StandardScaler())
    encode = preprocessing.OneHotEncoder(handle_unknown="ignore")
    for name, model in {"logistic": linear_model.LogisticRegression(),
                        "forest": ensemble.RandomForestClassifier(9),
                        "boosting": ensemble.GradientBoostingClassifier(n_estimators=9)}.items():
        table = compose.ColumnTransformer([("n", numeric, ["n0", "n1"]), ("c", encode, ["colour", "size"])])
        add(f"pipe_columns_{name}", pipeline.make_pipeline(table, model), NAMES, columns, types=types, zipmap=True)
    table = compose.ColumnTransformer([("n", numeric, ["n0", "n1"]), ("c", preprocessing.OrdinalEncoder(), ["colour"])],
                                      remainder="drop")
    add("pipe_columns_regress", pipeline.make_pipeline(table, ensemble.RandomForestRegressor(9)), T, columns, types=types)


def tensor_type(x):
    kinds = {"f4": FloatTensorType, "f8": DoubleTensorType, "i8": Int64TensorType}
    return kinds.get(x.dtype.str[1:], StringTensorType)([None, *x.shape[1:]])


def values(output):
    """A tensor; of maps their values, in the order of the keys."""
    if isinstance(output, list):
        return np.array([list(row.values()) for row in output], np.float32)
    return np.array([str(v) for v in output.ravel()]).reshape(output.shape) if output.dtype == object else output


def write(folder, name):
    model, x, y, opset, types, options = ZOO[name]
    if isinstance(x, dict):
        import pandas
        frame = pandas.DataFrame({key: column[:, 0] for key, column in x.items()})
        model.fit(frame, y)
        feeds = x
    else:
        model.fit(x, y) if y is not None else model.fit(x)
        types, feeds = [("X", tensor_type(x))], {"X": x}
    options = {id(model): options} if options else None
    converted = to_onnx(model, initial_types=types, target_opset=opset, options=options)
    path = folder / f"{name}.onnx"
    path.write_bytes(converted.SerializeToString())
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    for number, rows in enumerate(ROWS):
        inputs = {key: column[40 * number:40 * number + rows] for key, column in feeds.items()}
        answers = session.run(None, inputs)
        stem = folder / (name if number == 0 else f"{name}.2")
        np.savez(f"{stem}.in.npz", **inputs)
        np.savez(f"{stem}.out.npz", **{key: values(answer) for key, answer in zip(names, answers)})


def main():
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    onnxruntime.set_default_logger_severity(4)
    for collect in (numbers, transformers, pipelines):
        collect()
    wanted = sys.argv[2:] or list(ZOO)
    refused = []
    for name in wanted:
        try:
            write(folder, name)
        except Exception as error:  # the converter's own limits
            (folder / f"{name}.onnx").unlink(missing_ok=True)
            refused.append(f"{name}: {type(error).__name__} {str(error).strip().splitlines()[0][:150] if str(error).strip() else ''}")
            if len(wanted) < 4:
                traceback.print_exc()
    print(f"{len(wanted) - len(refused)} models in {folder}; not converted:", *refused, sep="\n  ")


if __name__ == "__main__":
    main()
